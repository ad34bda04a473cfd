"""CPSA backward. The attention weights are computed again, tile by tile.

Of up to 64 patches it reads and writes the map, where its registers hold that; else tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from catkernels.kernels.cpsa.flash_backward import flash_backward
from catkernels.kernels.cpsa.launch import PROGRAMS, Problem, backward_passes, route
from catkernels.kernels.cpsa.map_tiles import (
    ROWS,
    from_groups,
    map_tile,
    put_group,
    tile_dropout,
    tile_query,
    tile_softmax,
    to_groups,
    with_ones,
)
from catkernels.kernels.cpsa.tiles import COUNTS, GRID, PIXELS
from catkernels.kernels.cpsa.tokens import from_tokens, to_tokens
from catkernels.kernels.cpsa.weights import (
    MATRIX,
    PARTIAL,
    SCORE_SCALE,
    VALUE_SCALE,
    load_matrix,
    prepare_weights,
    sum_partials,
)
from catkernels.kernels.launch import launched_as, on_device
from catkernels.kernels.tiles import dot


@triton.jit(do_not_specialize=COUNTS)
def cpsa_map_backward_kernel(
    x_ptr,
    grad_ptr,
    matrices_ptr,
    constants_ptr,
    seed_ptr,
    dx_ptr,
    partials_ptr,
    num_tiles,
    height,
    width,
    num_patches,
    drop_threshold,
    keep_scale,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    PATCHES_HIGH: tl.constexpr,
    PATCHES_LOW: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FULL: tl.constexpr,
    PADDED: tl.constexpr,
    WIDE: tl.constexpr,
    AHEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    GIVE_X: tl.constexpr,
    GIVE_SCORE: tl.constexpr,
    GIVE_VALUE: tl.constexpr,
):
    """The gradients that out = softmax(x A x^T) x M sends to x and to the weights.

    x has coordinates that are 1, so that the columns of theirs are the gradients of the constants.
    That of the bias is summed beside, exactly. AHEAD fetches the next tile before the products of
    one.

    Grid: (programs,)
    Writes: dx_ptr (B, H, W, C); partials_ptr (programs, PARTIAL), each program's sums: of A^T, of
        M^T and of the bias.
    """
    PATCHES: tl.constexpr = PATCHES_HIGH * PATCHES_LOW
    GROUPS: tl.constexpr = BLOCK_C * PATCHES // ROWS
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    dtype: tl.constexpr = matrices_ptr.dtype.element_ty
    map_size = (height, width, num_patches)
    dropout = (seed_ptr, drop_threshold, keep_scale)
    scales = (tl.load(constants_ptr + SCORE_SCALE), tl.load(constants_ptr + VALUE_SCALE))
    if dtype == tl.float32:
        matrices = (matrices_ptr, matrices_ptr + MATRIX)
    else:
        # loaded before the loop they stay in shared memory; hoisted by LLVM, in registers
        matrices = (load_matrix(matrices_ptr), load_matrix(matrices_ptr + MATRIX))
    gradients = (tl.zeros((PIXELS, PIXELS), tl.float32), tl.zeros((PIXELS, PIXELS), tl.float32))
    # [x, (low patch, y)]; summed over threads only after the loop
    bias_grad = tl.zeros((GRID, PATCHES_LOW * GRID), tl.float32)
    if PATCHES > 16:
        # neighbours run at the same time: the second level of cache holds the sectors they share
        first_tile, last_tile, step = tl.program_id(0), num_tiles, tl.num_programs(0)
    else:
        # neighbours run one after the other in a program: the first level holds them
        tiles = tl.cdiv(num_tiles, tl.num_programs(0))
        first_tile, step = tl.program_id(0) * tiles, 1
        last_tile = tl.minimum(first_tile + tiles, num_tiles)
    if AHEAD:
        x, grad = _load_tiles(
            x_ptr,
            grad_ptr,
            tl.minimum(first_tile, num_tiles - 1),
            map_size,
            PATCHES_HIGH,
            PATCHES_LOW,
            BLOCK_C,
            CHANNELS,
            PATCH,
            FULL,
            PADDED,
            WIDE,
            dtype,
        )
    for tile in tl.range(first_tile, last_tile, step, disable_licm=True):
        if not AHEAD:
            x, grad = _load_tiles(
                x_ptr,
                grad_ptr,
                tile,
                map_size,
                PATCHES_HIGH,
                PATCHES_LOW,
                BLOCK_C,
                CHANNELS,
                PATCH,
                FULL,
                PADDED,
                WIDE,
                dtype,
            )
        if GIVE_VALUE:
            rows = tl.reshape(
                grad.to(tl.float32), (PATCHES_HIGH, GRID, PATCHES_LOW * GRID, BLOCK_C)
            )
            bias_grad += tl.sum(tl.sum(rows, 3), 0)
        # GROUPS times [ROWS, PIXELS]
        x_groups = to_groups(with_ones(x, BLOCK_C), GROUPS, PATCHES_HIGH, PATCHES_LOW)
        grad_groups = to_groups(grad, GROUPS, PATCHES_HIGH, PATCHES_LOW)
        if AHEAD:
            x, grad = _load_tiles(
                x_ptr,
                grad_ptr,
                tl.minimum(tile + step, num_tiles - 1),
                map_size,
                PATCHES_HIGH,
                PATCHES_LOW,
                BLOCK_C,
                CHANNELS,
                PATCH,
                FULL,
                PADDED,
                WIDE,
                dtype,
            )
        image = tile // BLOCKS
        first_channel = tile % BLOCKS * BLOCK_C
        # [GROUPS, ROWS, PIXELS]
        dx = tl.zeros((GROUPS, ROWS, PIXELS), x_ptr.dtype.element_ty)
        for group in tl.static_range(GROUPS):
            group_dx, gradients = _tile_gradients(
                x_groups[group],
                grad_groups[group],
                gradients,
                matrices,
                scales,
                dropout,
                image,
                first_channel + group * (ROWS // PATCHES),
                num_patches,
                PATCHES,
                FULL,
                PRECISION,
                GIVE_X,
                GIVE_SCORE,
                GIVE_VALUE,
            )
            if GIVE_X:
                dx = put_group(dx, group_dx, group)
        if GIVE_X:
            offset, inside = map_tile(
                map_size,
                0,
                first_channel,
                PATCHES_HIGH,
                PATCHES_LOW,
                BLOCK_C,
                CHANNELS,
                PATCH,
                FULL,
                PADDED,
                WIDE,
            )
            image_start = tl.cast(image, tl.int64) * height * width * CHANNELS
            dx = from_groups(dx, GROUPS, PATCHES_HIGH, PATCHES_LOW)
            tl.store(dx_ptr + image_start + offset, dx, mask=inside)

    pixel = tl.arange(0, PIXELS)
    place = pixel[:, None] * PIXELS + pixel[None, :]
    partials_ptr += tl.program_id(0) * PARTIAL
    score_grad, value_grad = gradients
    if GIVE_SCORE:
        tl.store(partials_ptr + place, score_grad)
    if GIVE_VALUE:
        tl.store(partials_ptr + MATRIX + place, value_grad)
        bias_grad = tl.sum(tl.reshape(bias_grad, (GRID, PATCHES_LOW, GRID)), 1)
        side = tl.arange(0, GRID)
        place = side[None, :] * GRID + side[:, None]
        tl.store(partials_ptr + 2 * MATRIX + 2 * PIXELS + place, bias_grad)


@triton.jit
def _load_tiles(
    x_ptr,
    grad_ptr,
    tile,
    map_size,
    PATCHES_HIGH: tl.constexpr,
    PATCHES_LOW: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    FULL: tl.constexpr,
    PADDED: tl.constexpr,
    WIDE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """A tile of x and of grad: (PATCHES_HIGH * GRID, PATCHES_LOW * GRID * BLOCK_C) each."""
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    height, width, _ = map_size
    offset, inside = map_tile(
        map_size,
        0,
        tile % BLOCKS * BLOCK_C,
        PATCHES_HIGH,
        PATCHES_LOW,
        BLOCK_C,
        CHANNELS,
        PATCH,
        FULL,
        PADDED,
        WIDE,
    )
    image_start = tl.cast(tile // BLOCKS, tl.int64) * height * width * CHANNELS
    x = tl.load(x_ptr + image_start + offset, mask=inside, other=0.0).to(DTYPE)
    grad = tl.load(grad_ptr + image_start + offset, mask=inside, other=0.0).to(DTYPE)
    return x, grad


@triton.jit
def _tile_gradients(
    x,
    grad,
    gradients,
    matrices,
    scales,
    dropout,
    image,
    first_channel,
    num_patches,
    PATCHES: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    GIVE_X: tl.constexpr,
    GIVE_SCORE: tl.constexpr,
    GIVE_VALUE: tl.constexpr,
):
    """dx (ROWS, PIXELS) of a tile, in float32, and ``gradients`` with the tile's added.

    ``gradients`` are those of A^T and of M^T. That of A stays divided by the power of M, which dx
    and the sum over the programs multiply with in the end. x and grad are right factors only, as in
    `tile_query`.
    """
    dtype: tl.constexpr = x.dtype
    score_scale, value_scale = scales
    score_grad, value_grad = gradients
    factor = tile_dropout(dropout, image, first_channel, PATCHES)
    if PATCHES > 1:
        query = tile_query(x, _matrix(matrices, 0, dtype), PRECISION)
        # [ROWS, ROWS]
        attention = tile_softmax(query, x, num_patches, score_scale, PATCHES, FULL, PRECISION)

    dx = x.to(tl.float32)
    if GIVE_X or GIVE_VALUE:
        # [ROWS, PIXELS], of the values x M
        if PATCHES > 1:
            dropped = (attention * factor).to(dtype)
            values_grad = dot(tl.trans(dropped), grad, PRECISION).to(dtype)
        else:
            values_grad = (grad * factor).to(dtype)
    if GIVE_VALUE:
        value_grad += dot(tl.trans(values_grad), x, PRECISION)
    if PATCHES > 1 and (GIVE_X or GIVE_SCORE):
        # [ROWS, PIXELS]
        attended_grad = dot(_matrix(matrices, 1, dtype), tl.trans(grad), PRECISION)
        attended_grad = tl.trans(attended_grad.to(dtype))
        # [ROWS, ROWS]
        attention_grad = dot(attended_grad, tl.trans(x), PRECISION) * factor
        delta = tl.sum(attention * attention_grad, 1)[:, None]
        scores_grad = (attention * (attention_grad - delta)).to(dtype)
        # [ROWS, PIXELS]
        query_grad = dot(scores_grad, x, PRECISION).to(dtype)
        if GIVE_SCORE:
            score_grad += dot(tl.trans(query_grad), x, PRECISION)
        if GIVE_X:
            dx = dot(tl.trans(scores_grad), query, PRECISION)
            dx += dot(query_grad, tl.trans(_matrix(matrices, 0, dtype)), PRECISION)
            dx *= score_scale
            dx += dot(values_grad, tl.trans(_matrix(matrices, 1, dtype)), PRECISION)
            dx *= value_scale
    elif GIVE_X:
        dx = dot(values_grad, tl.trans(_matrix(matrices, 1, dtype)), PRECISION) * value_scale
    return dx, (score_grad, value_grad)


@triton.jit
def _matrix(matrices, KIND: tl.constexpr, dtype: tl.constexpr):
    """A (KIND 0) or M (KIND 1). In float32 it is fetched anew: shared memory has no room for it."""
    if dtype == tl.float32:
        return load_matrix(matrices[KIND], True)
    else:
        return matrices[KIND]


def cpsa_backward(
    grad: Tensor,
    x: Tensor,
    folded: Tensor,
    seed: Tensor | None,
    dx: Tensor | None,
    folded_grad: Tensor | None,
    bias_grad: Tensor | None,
    patch_size: int,
    dropout_p: float,
) -> None:
    """The gradients of `cpsa_forward`, computed in the dtype of ``grad``. Tensors are contiguous.

    Args:
        grad: gradient (B, H, W, C) of the output.
        x, seed: as in the forward pass.
        folded: float32 (2, N*N + 1, N*N), see `catkernels.reference.fold_weights`.
        dx: written; gradient (B, H, W, C) of x, in its dtype. Or None.
        folded_grad, bias_grad: written; gradients of ``folded`` and of the bias (N*N,), in float32.
            Or both None.
    """
    needs = (dx is not None, folded_grad is not None)
    with on_device(x.device):
        problem = Problem.of(x, grad.dtype, patch_size, dropout_p)
        # where every row of attention weights sums to 1, what they all add moves no gradient
        value_rows = "none" if seed is None else "values"
        matrices, constants = prepare_weights(folded, patch_size, grad.dtype, value_rows)
        attention = {
            "matrices_ptr": matrices,
            "constants_ptr": constants,
            "seed_ptr": seed,
            **problem.attention_arguments(),
        }
        on_map = route(problem, backward=True) == "map"
        if on_map:
            partials = _map_backward(x, grad, dx, problem, attention, *needs)
        else:
            tokens, grad_tokens = to_tokens(x, problem), to_tokens(grad, problem)
            dx_tokens, partials = flash_backward(tokens, grad_tokens, problem, attention, *needs)
            if dx is not None:
                from_tokens(dx_tokens, problem, dx)
        if folded_grad is not None:
            sum_partials(partials, constants, folded_grad, bias_grad, patch_size, transposed=on_map)


def _map_backward(
    x: Tensor,
    grad: Tensor,
    dx: Tensor | None,
    problem: Problem,
    attention: dict,
    needs_x: bool,
    needs_weights: bool,
) -> Tensor:
    """Fill ``dx`` (B, H, W, C); the programs' sums (programs, PARTIAL)."""
    passes = launched_as(backward_passes, problem)
    tiles = [problem.batch * triton.cdiv(problem.channels, p.block_c) for p in passes]
    partials = x.new_empty((min(PROGRAMS, *tiles), PARTIAL.value), dtype=torch.float32)
    for backward_pass, num_tiles in zip(passes, tiles, strict=True):
        if backward_pass.is_needed(needs_x, needs_weights):
            cpsa_map_backward_kernel[(partials.shape[0],)](
                x_ptr=x,
                grad_ptr=grad,
                dx_ptr=dx,
                partials_ptr=partials,
                num_tiles=num_tiles,
                **problem.map_arguments(),
                FULL=problem.fills_tiles,
                **attention,
                **backward_pass.pass_constants(needs_x, needs_weights),
            )
    return partials
