"""Pieces of kernels that several families use."""

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """``a @ b`` accumulated in float32."""
    if INTERPRETED:
        # the interpreter would multiply the bit patterns of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def chunk_bounds(chunk, num_chunks, num_items):
    """First and last + 1 of the items of a chunk; chunks differ by at most one item."""
    length = num_items // num_chunks
    longer = num_items % num_chunks
    first = chunk * length + tl.minimum(chunk, longer)
    return first, first + length + tl.where(chunk < longer, 1, 0)


@triton.jit
def keep_word(seed, threshold, first_column, row, head, sequence):
    """Dropout of 32 columns of an attention matrix: bit c keeps column ``first_column + c``.

    An element is kept where its 16 random bits are at least ``threshold``. They come from Philox at
    the counter (column // 8, row, head, sequence), so that no launch or tile shape changes them.
    ``row``, ``head`` and ``sequence`` are [ROWS] and int32, ``first_column`` a multiple of 8.
    """
    group = tl.arange(0, 4)
    # [ROWS, 4]
    zero = tl.zeros([row.shape[0], 4], tl.int32)
    column_group = zero + (first_column // 8 + group)[None, :]
    bits_01, bits_23, bits_45, bits_67 = tl.philox(
        seed, column_group, zero + row[:, None], zero + head[:, None], zero + sequence[:, None]
    )
    keep = _keep_pair(bits_01, threshold)
    keep |= _keep_pair(bits_23, threshold) << 2
    keep |= _keep_pair(bits_45, threshold) << 4
    keep |= _keep_pair(bits_67, threshold) << 6
    # the bits of the groups are disjoint: their sum is their union
    return tl.sum(keep << (8 * group)[None, :], 1)


@triton.jit
def _keep_pair(bits, threshold):
    """Two decisions from 32 random bits: bit 0 from the low half, bit 1 from the high half."""
    low = ((bits & 0xFFFF) >= threshold).to(tl.int32)
    high = ((bits >> 16) >= threshold).to(tl.int32)
    return low | (high << 1)
