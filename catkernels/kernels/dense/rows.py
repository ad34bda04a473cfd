"""Rows of C channels in pieces: how the kernels of a block load, norm, multiply and store them.

A tile's sides are powers of two. 96 or 192 channels are held as two pieces, 64 + 32 or 128 + 64, as
tuples of tiles: no product is padded.
"""

import triton
import triton.language as tl

from catkernels.kernels.tiles import INTERPRETED


@triton.jit
def row_channels(C: tl.constexpr, WIDE: tl.constexpr):
    """The channels of a row's pieces: [WIDE] and, where that is not all, [C - WIDE]."""
    if C == WIDE:
        channels = (tl.arange(0, WIDE),)
    else:
        channels = (tl.arange(0, WIDE), WIDE + tl.arange(0, C - WIDE))
    return channels


@triton.jit
def load_rows(ptr, row, inside, channels, C: tl.constexpr):
    """Rows (rows, C) in pieces [ROWS, WIDTH]; zeros where no row is."""
    pieces = ()
    for i in tl.static_range(len(channels)):
        place = row[:, None] * C + channels[i][None, :]
        pieces += (tl.load(ptr + place, mask=inside[:, None], other=0.0),)
    return pieces


@triton.jit
def load_rows_again(ptr, row, inside, channels, C: tl.constexpr):
    """What `load_rows` gave, from the second-level cache: it was not held meanwhile.

    The other eviction policy is what keeps the compiler from taking both loads for one.
    """
    pieces = ()
    for i in tl.static_range(len(channels)):
        place = ptr + row[:, None] * C + channels[i][None, :]
        piece = tl.load(place, mask=inside[:, None], other=0.0, eviction_policy="evict_first")
        pieces += (piece,)
    return pieces


@triton.jit
def zero_sums(ROWS: tl.constexpr, channels):
    """Sums to be: pieces [ROWS, WIDTH], float32."""
    pieces = ()
    for i in tl.static_range(len(channels)):
        pieces += (tl.zeros((ROWS, channels[i].shape[0]), tl.float32),)
    return pieces


@triton.jit
def row_statistics(x, eps, C: tl.constexpr):
    """Mean and inverse deviation [ROWS] of rows in pieces, float32."""
    total = tl.sum(x[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(x)):
        total += tl.sum(x[i].to(tl.float32), 1)
    mean = total * (1.0 / C)
    centred = x[0].to(tl.float32) - mean[:, None]
    squares = tl.sum(centred * centred, 1)
    for i in tl.static_range(1, len(x)):
        centred = x[i].to(tl.float32) - mean[:, None]
        squares += tl.sum(centred * centred, 1)
    return mean, tl.rsqrt(squares * (1.0 / C) + eps)


@triton.jit
def normed_rows(x, mean, rstd, weight_ptr, bias_ptr, channels, dtype: tl.constexpr):
    """``(x - mean) rstd weight + bias`` of rows in pieces, rounded to ``dtype``."""
    pieces = ()
    for i in tl.static_range(len(channels)):
        weight = tl.load(weight_ptr + channels[i]).to(tl.float32)
        y = (x[i].to(tl.float32) - mean[:, None]) * rstd[:, None] * weight[None, :]
        if bias_ptr is not None:
            y += tl.load(bias_ptr + channels[i]).to(tl.float32)[None, :]
        pieces += (y.to(dtype),)
    return pieces


@triton.jit
def load_matrix_rows(ptr, row, channels, C: tl.constexpr):
    """Some rows of a weight (.., C), in pieces [UNITS, WIDTH]."""
    pieces = ()
    for i in tl.static_range(len(channels)):
        pieces += (tl.load(ptr + row[:, None] * C + channels[i][None, :]),)
    return pieces


@triton.jit
def load_matrix_columns(ptr, column, channels, COLUMNS: tl.constexpr):
    """Some columns of a weight (C, COLUMNS), in pieces [WIDTH, UNITS]."""
    pieces = ()
    for i in tl.static_range(len(channels)):
        pieces += (tl.load(ptr + channels[i][:, None] * COLUMNS + column[None, :]),)
    return pieces


@triton.jit
def product(rows, matrix, PRECISION: tl.constexpr):
    """``rows @ matrix``: pieces [ROWS, WIDTH] with pieces [WIDTH, UNITS], [ROWS, UNITS] float32."""
    total = tl.zeros((rows[0].shape[0], matrix[0].shape[1]), tl.float32)
    for i in tl.static_range(len(rows)):
        total = dot_added(rows[i], matrix[i], total, PRECISION)
    return total


@triton.jit
def transposed(matrix):
    """The pieces of a weight, each transposed."""
    pieces = ()
    for i in tl.static_range(len(matrix)):
        pieces += (tl.trans(matrix[i]),)
    return pieces


@triton.jit
def added_product(totals, units, matrix, PRECISION: tl.constexpr):
    """``totals + units @ matrix``: pieces [ROWS, WIDTH], of [ROWS, UNITS] and [UNITS, WIDTH]."""
    pieces = ()
    for i in tl.static_range(len(matrix)):
        pieces += (dot_added(units, matrix[i], totals[i], PRECISION),)
    return pieces


@triton.jit
def dot_added(a, b, total, PRECISION: tl.constexpr):
    """``total + a @ b`` accumulated in float32."""
    if INTERPRETED:
        # the interpreter would multiply the bit patterns of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def image_factors(factor_ptr, row, inside, rows_per_image):
    """What each row's branch is multiplied with: its image's factor, or 1. float32 [ROWS]"""
    if factor_ptr is None:
        factor = tl.full(row.shape, 1.0, tl.float32)
    else:
        factor = tl.load(factor_ptr + row // rows_per_image, mask=inside, other=0.0).to(tl.float32)
    return factor


@triton.jit
def store_residual(
    out_ptr,
    x_ptr,
    branch,
    bias_ptr,
    factor_ptr,
    row,
    inside,
    channels,
    rows_per_image,
    C: tl.constexpr,
):
    """Write ``x + factor (branch + bias)`` of rows in pieces."""
    factor = image_factors(factor_ptr, row, inside, rows_per_image)
    x = load_rows_again(x_ptr, row, inside, channels, C)
    for i in tl.static_range(len(channels)):
        y = branch[i]
        if bias_ptr is not None:
            y += tl.load(bias_ptr + channels[i]).to(tl.float32)[None, :]
        y = x[i].to(tl.float32) + y * factor[:, None]
        place = row[:, None] * C + channels[i][None, :]
        tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=inside[:, None])
