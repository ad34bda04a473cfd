"""The folded weights as the CPSA kernels hold them, and the way back for their gradients.

The kernels hold two matrices (2, 64, 64) in their own dtype: A and M on the 8 x 8 grid, divided by
powers of two that bring their largest element into [1, 2), so that half precision neither overflows
nor underflows. Beside them stand float32 constants (4, 64): u, divided as A is; Wp bv; bp; and a
row that begins with the two powers.

A patch of less than 8 x 8 pixels leaves coordinates free, which kernels on map tiles set to 1: the
matrices' rows of those are what is added to x A and to x M, in two parts, because one rounded to
half precision would round u more than it may be. Where tokens are zero there they add nothing.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from catkernels.kernels.cpsa.tiles import GRID, PIXELS

# where the constants begin
SCORE_CONSTANT = tl.constexpr(0)
VALUE_CONSTANT = tl.constexpr(64)
BIAS = tl.constexpr(128)
SCORE_SCALE = tl.constexpr(192)
VALUE_SCALE = tl.constexpr(193)

MATRIX = tl.constexpr(64 * 64)
# the coordinates whose rows are a constant: what its rounding keeps, and the rest
CONSTANT_ROW, REST_ROW = tl.constexpr(63), tl.constexpr(55)
# a program's share of the gradients: of both matrices, then of u, Wp bv and bp
PARTIAL = tl.constexpr(2 * 64 * 64 + 3 * 64)
# What one program sums over all shares: 128 bytes, so that there are programs enough for a GPU.
SUM_BLOCK = 32


@triton.jit
def load_matrix(matrix_ptr, VOLATILE: tl.constexpr = False):
    """A matrix (PIXELS, PIXELS); VOLATILE keeps the compiler from fetching it once for all uses."""
    pixel = tl.arange(0, PIXELS)
    return tl.load(matrix_ptr + pixel[:, None] * PIXELS + pixel[None, :], volatile=VOLATILE)


@triton.jit
def load_constants(constants_ptr):
    """A row (1, PIXELS) of the constants."""
    return tl.load(constants_ptr + tl.arange(0, PIXELS))[None, :]


@triton.jit
def zero_gradients():
    """A program's gradients: of A and M (PIXELS, PIXELS), of u, Wp bv and bp (PIXELS,)."""
    matrix = tl.zeros((PIXELS, PIXELS), tl.float32)
    constants = tl.zeros((PIXELS,), tl.float32)
    return matrix, matrix, constants, constants, constants


@triton.jit
def sum_rows(tile):
    """The sum (PIXELS,) of a tile's rows, in float32 and three steps.

    Short chains round less, and each step sums lanes that adjoin: Triton before 3.8 takes those of
    an axis for neighbours. Rows lie in eights in every layout, those of a product and of a map.
    """
    tile = tl.reshape(tile.to(tl.float32), (tile.shape[0] // 16, 2, 8, PIXELS))
    return tl.sum(tl.sum(tl.sum(tile, 2), 1), 0)


@triton.jit
def sum_weighted_rows(tile, weights):
    """`sum_rows` of a tile whose rows are multiplied by ``weights`` (ROWS, 1)."""
    # What is added to zero is rounded here. A mere product would be fused with the first addition
    # of the sum: two lanes would each round the other's product only, and hold different sums.
    return sum_rows(tl.fma(tile.to(tl.float32), weights, 0.0))


@triton.jit
def store_gradients(
    partial_ptr, gradients, seed_ptr, GIVE_SCORE: tl.constexpr, GIVE_VALUE: tl.constexpr
):
    """Store a program's gradients, those of the scores' or of the values' weights, or both."""
    pixel = tl.arange(0, PIXELS)
    place = pixel[:, None] * PIXELS + pixel[None, :]
    score_grad, value_grad, score_constant_grad, value_constant_grad, out_constant_grad = gradients
    constants_ptr = partial_ptr + 2 * MATRIX
    if GIVE_SCORE:
        tl.store(partial_ptr + place, score_grad)
        tl.store(constants_ptr + pixel, score_constant_grad)
    if GIVE_VALUE:
        if seed_ptr is None:
            # every row of attention weights then sums to 1
            value_constant_grad = out_constant_grad
        tl.store(partial_ptr + MATRIX + place, value_grad)
        tl.store(constants_ptr + PIXELS + pixel, value_constant_grad)
        tl.store(constants_ptr + 2 * PIXELS + pixel, out_constant_grad)


@triton.jit
def pixels_on_grid(PATCH: tl.constexpr):
    """The pixel at each coordinate (PIXELS,), and whether there is one."""
    coordinate = tl.arange(0, PIXELS)
    row, column = coordinate // GRID, coordinate % GRID
    return row * PATCH + column, (row < PATCH) & (column < PATCH)


@triton.jit
def cpsa_prepare_weights_kernel(
    folded_ptr,
    matrices_ptr,
    constants_ptr,
    PATCH: tl.constexpr,
    VALUE_ROWS: tl.constexpr,
):
    """A, M and the constants of folded weights (2, N*N + 1, N*N), on the grid: `store_weights`.

    For the backward pass, in which the bias of the outputs takes no part.

    Grid: (2,), the scores' weights and the values'.
    Writes: matrices_ptr (2, 64, 64), constants_ptr (4, 64) up to the powers in its last row.
    """
    side: tl.constexpr = PATCH * PATCH
    kind = tl.program_id(0)
    pixel, real = pixels_on_grid(PATCH)

    folded_ptr += kind * (side + 1) * side
    # [PIXELS, PIXELS]
    matrix = tl.load(
        folded_ptr + pixel[:, None] * side + pixel[None, :],
        mask=real[:, None] & real[None, :],
        other=0.0,
    )
    # [PIXELS]
    constant = tl.load(folded_ptr + side * side + pixel, mask=real, other=0.0)
    bias = tl.zeros_like(constant)
    store_weights(matrix, constant, bias, kind, matrices_ptr, constants_ptr, PATCH, VALUE_ROWS)


@triton.jit
def store_weights(
    matrix,
    constant,
    bias,
    kind,
    matrices_ptr,
    constants_ptr,
    PATCH: tl.constexpr,
    VALUE_ROWS: tl.constexpr,
):
    """Scale and store A with u (kind 0), or M with Wp bv and bp (kind 1), which lie on the grid.

    They are a matrix (PIXELS, PIXELS), a constant (PIXELS,) and a bias (PIXELS,), all in float32.
    VALUE_ROWS says what of the constants is M's: "out", Wp bv + bp; "values", Wp bv; or "none".
    """
    coordinate = tl.arange(0, PIXELS)
    added = constant
    if kind == 1:
        if VALUE_ROWS == "out":
            added = constant + bias
        elif VALUE_ROWS == "none":
            added = tl.zeros_like(constant)

    # x A + u is rounded as one: u must not overflow either
    largest = tl.maximum(tl.max(tl.max(tl.abs(matrix), 1), 0), tl.max(tl.abs(added), 0))
    # the exponent field of a normal number, that of 1 for zero; 2**e and 2**-e are then exact
    exponent = tl.cast(largest, tl.int32, bitcast=True) >> 23
    exponent = tl.where(exponent == 0, 127, tl.minimum(exponent, 253))
    power = tl.cast(exponent << 23, tl.float32, bitcast=True)
    inverse = tl.cast((254 - exponent) << 23, tl.float32, bitcast=True)

    dtype: tl.constexpr = matrices_ptr.dtype.element_ty
    if PATCH < GRID:
        kept = _rounded(added * inverse, dtype)
        is_constant = coordinate[:, None] == CONSTANT_ROW
        matrix = tl.where(is_constant, (kept * power)[None, :], matrix)
        is_rest = coordinate[:, None] == REST_ROW
        matrix = tl.where(is_rest, (added - kept * power)[None, :], matrix)
    place = coordinate[:, None] * PIXELS + coordinate[None, :]
    tl.store(matrices_ptr + kind * MATRIX + place, (matrix * inverse).to(dtype))
    tl.store(constants_ptr + SCORE_SCALE + kind, power)
    if kind == 0:
        tl.store(constants_ptr + SCORE_CONSTANT + coordinate, constant * inverse)
    else:
        tl.store(constants_ptr + VALUE_CONSTANT + coordinate, constant)
        tl.store(constants_ptr + BIAS + coordinate, bias)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """Float32 numbers rounded to ``dtype``, or to TF32, in which a product may take float32."""
    if dtype == tl.float32:
        return tl.cast(tl.cast(x, tl.int32, bitcast=True) & ~0x1FFF, tl.float32, bitcast=True)
    else:
        return x.to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["num_partials"])
def cpsa_sum_partials_kernel(
    partials_ptr,
    constants_ptr,
    folded_grad_ptr,
    bias_grad_ptr,
    num_partials,
    PATCH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
):
    """The gradients of the folded weights and of the bias from all programs' shares.

    TRANSPOSED shares hold those of A^T and M^T, and of u and Wp bv as their column `CONSTANT_ROW`.

    Grid: (blocks of a share,)
    Writes: folded_grad_ptr (2, N*N + 1, N*N) and bias_grad_ptr (N*N,), in a fixed order of sums.
    """
    side: tl.constexpr = PATCH * PATCH
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_matrix = place < 2 * MATRIX
    kind = tl.where(in_matrix, place // MATRIX, (place - 2 * MATRIX) // PIXELS)
    # the coordinates that a weight leads from and to
    origin = place % MATRIX // PIXELS
    to = place % PIXELS
    if TRANSPOSED:
        origin, to = tl.where(in_matrix, to, CONSTANT_ROW), tl.where(in_matrix, origin, to)
    is_constant = (origin == CONSTANT_ROW) if TRANSPOSED else ~in_matrix
    is_bias = kind == 2
    real = (to // GRID < PATCH) & (to % GRID < PATCH) & (place < PARTIAL)
    real = real & (is_constant | ((origin // GRID < PATCH) & (origin % GRID < PATCH)))
    if TRANSPOSED:
        real = real & (in_matrix | is_bias)

    # [BLOCK]
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_partials, BLOCK_PARTIALS):
        partial = first + tl.arange(0, BLOCK_PARTIALS)
        total += tl.sum(
            tl.load(
                partials_ptr + partial[:, None] * PARTIAL + place[None, :],
                mask=(partial < num_partials)[:, None] & real[None, :],
                other=0.0,
            ),
            0,
        )
    # the kernels' gradients of the scores are divided by the power of the values
    total *= tl.where(kind == 0, tl.load(constants_ptr + VALUE_SCALE), 1.0)
    column = to // GRID * PATCH + to % GRID
    row = tl.where(is_constant, side, origin // GRID * PATCH + origin % GRID)
    tl.store(
        folded_grad_ptr + (kind * (side + 1) + row) * side + column, total, mask=real & ~is_bias
    )
    tl.store(bias_grad_ptr + column, total, mask=real & is_bias)


def empty_weights(like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The matrices and constants that `store_weights` fills, on the device of ``like``."""
    matrices = like.new_empty((2, PIXELS.value, PIXELS.value), dtype=dtype)
    return matrices, like.new_empty((4, PIXELS.value), dtype=torch.float32)


def prepare_weights(
    folded: Tensor,
    patch_size: int,
    dtype: torch.dtype,
    value_rows: Literal["values", "none"],
) -> tuple[Tensor, Tensor]:
    """The matrices (2, 64, 64) in ``dtype`` and the float32 constants (4, 64) of folded weights."""
    matrices, constants = empty_weights(folded, dtype)
    cpsa_prepare_weights_kernel[(2,)](
        folded,
        matrices,
        constants,
        PATCH=patch_size,
        VALUE_ROWS=value_rows,
        num_warps=4,
    )
    return matrices, constants


def sum_partials(
    partials: Tensor,
    constants: Tensor,
    folded_grad: Tensor,
    bias_grad: Tensor,
    patch_size: int,
    transposed: bool,
) -> None:
    """Write the gradients (2, N*N + 1, N*N) of the folded weights and (N*N,) of the bias."""
    cpsa_sum_partials_kernel[(triton.cdiv(PARTIAL.value, SUM_BLOCK),)](
        partials,
        constants,
        folded_grad,
        bias_grad,
        partials.shape[0],
        PATCH=patch_size,
        TRANSPOSED=transposed,
        BLOCK=SUM_BLOCK,
        # 16 fetched at a time by each thread; more would only take long to compile
        BLOCK_PARTIALS=64,
        num_warps=4,
    )
