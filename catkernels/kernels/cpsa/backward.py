"""CPSA backward. The attention weights are computed again, tile by tile.

Of up to 16 patches it reads and writes the map, of more their tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from catkernels.kernels.cpsa.flash_backward import flash_backward
from catkernels.kernels.cpsa.launch import (
    PROGRAMS,
    Problem,
    backward_passes,
    backward_route,
)
from catkernels.kernels.cpsa.tiles import (
    PIXELS,
    ROWS,
    from_groups,
    get_group,
    map_tile,
    put_group,
    tile_dropout,
    tile_softmax,
    to_groups,
)
from catkernels.kernels.cpsa.tokens import from_tokens, load_tokens, store_tokens, to_tokens
from catkernels.kernels.cpsa.weights import (
    MATRIX,
    PARTIAL,
    SCORE_CONSTANT,
    SCORE_SCALE,
    VALUE_CONSTANT,
    VALUE_SCALE,
    load_constants,
    load_matrix,
    prepare_weights,
    store_gradients,
    sum_partials,
    sum_rows,
    sum_weighted_rows,
    zero_gradients,
)
from catkernels.kernels.launch import launched_as, on_device
from catkernels.kernels.tiles import dot


@triton.jit
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
    PADDED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    GIVE_X: tl.constexpr,
    GIVE_SCORE: tl.constexpr,
    GIVE_VALUE: tl.constexpr,
):
    """The gradients that out = softmax((x A + u) x^T) x M + c sends to x and to the weights.

    Grid: (programs,), each of which takes as many tiles in a row: some channels of an image each
    Writes: dx_ptr (B, H, W, C); partials_ptr (programs, PARTIAL), each program's sum.
    """
    PATCHES: tl.constexpr = PATCHES_HIGH * PATCHES_LOW
    GROUPS: tl.constexpr = BLOCK_C * PATCHES // ROWS
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    dtype: tl.constexpr = matrices_ptr.dtype.element_ty
    map_size = (height, width, num_patches)
    weights = (matrices_ptr, constants_ptr)
    dropout = (seed_ptr, drop_threshold, keep_scale)
    gradients = zero_gradients()
    # tiles in a row share sectors of the map, which the first level of cache then still holds
    tiles = tl.cdiv(num_tiles, tl.num_programs(0))
    first_tile = tl.program_id(0) * tiles
    last_tile = tl.minimum(first_tile + tiles, num_tiles)
    # hoisted weights would hold registers through the loop, which has none to spare
    for tile in tl.range(first_tile, last_tile, disable_licm=True):
        image = tile // BLOCKS
        first_channel = tile % BLOCKS * BLOCK_C
        image_start = tl.cast(image, tl.int64) * height * width * CHANNELS
        # [PATCHES_HIGH, GRID, PATCHES_LOW, GRID, BLOCK_C]
        offset, inside = map_tile(
            map_size,
            0,
            first_channel,
            PATCHES_HIGH,
            PATCHES_LOW,
            BLOCK_C,
            CHANNELS,
            PATCH,
            PADDED,
            WIDE,
        )
        x = tl.load(x_ptr + image_start + offset, mask=inside, other=0.0).to(dtype)
        grad = tl.load(grad_ptr + image_start + offset, mask=inside, other=0.0).to(dtype)
        # [GROUPS, ROWS, PIXELS]
        x_groups = to_groups(x, GROUPS, PATCHES_HIGH, PATCHES_LOW)
        grad_groups = to_groups(grad, GROUPS, PATCHES_HIGH, PATCHES_LOW)
        if GIVE_X:
            dx_groups = tl.zeros((GROUPS, ROWS, PIXELS), dx_ptr.dtype.element_ty)
        for group in tl.static_range(GROUPS):
            dx, gradients = _tile_gradients(
                get_group(x_groups, group, dtype),
                get_group(grad_groups, group, dtype),
                gradients,
                weights,
                dropout,
                image,
                first_channel + group * (ROWS // PATCHES),
                num_patches,
                PATCHES,
                PRECISION,
                GIVE_X,
                GIVE_SCORE,
                GIVE_VALUE,
            )
            if GIVE_X:
                dx_groups = put_group(dx_groups, dx, group)
        if GIVE_X:
            dx = from_groups(dx_groups, GROUPS, PATCHES_HIGH, PATCHES_LOW)
            tl.store(dx_ptr + image_start + offset, dx, mask=inside)
    store_gradients(
        partials_ptr + tl.program_id(0) * PARTIAL, gradients, seed_ptr, GIVE_SCORE, GIVE_VALUE
    )


@triton.jit
def cpsa_tokens_backward_kernel(
    x_ptr,
    grad_ptr,
    matrices_ptr,
    constants_ptr,
    seed_ptr,
    dx_ptr,
    partials_ptr,
    num_sequences,
    num_channels,
    num_patches,
    drop_threshold,
    keep_scale,
    PRECISION: tl.constexpr,
    GIVE_X: tl.constexpr,
    GIVE_SCORE: tl.constexpr,
    GIVE_VALUE: tl.constexpr,
):
    """`cpsa_map_backward_kernel` on the tokens of up to 64 patches.

    Grid: (programs,), each of which takes every programs-th sequence
    Writes: dx_ptr (B*C, P, 64); partials_ptr (programs, PARTIAL), each program's sum.
    """
    weights = (matrices_ptr, constants_ptr)
    dropout = (seed_ptr, drop_threshold, keep_scale)
    gradients = zero_gradients()
    for sequence in tl.range(
        tl.program_id(0), num_sequences, tl.num_programs(0), disable_licm=True
    ):
        dx, gradients = _tile_gradients(
            load_tokens(x_ptr, sequence, 0, num_patches, ROWS),
            load_tokens(grad_ptr, sequence, 0, num_patches, ROWS),
            gradients,
            weights,
            dropout,
            sequence // num_channels,
            sequence % num_channels,
            num_patches,
            ROWS,
            PRECISION,
            GIVE_X,
            GIVE_SCORE,
            GIVE_VALUE,
        )
        if GIVE_X:
            store_tokens(dx_ptr, dx, sequence, 0, num_patches)
    store_gradients(
        partials_ptr + tl.program_id(0) * PARTIAL, gradients, seed_ptr, GIVE_SCORE, GIVE_VALUE
    )


@triton.jit
def _tile_gradients(
    x,
    grad,
    gradients,
    weights,
    dropout,
    image,
    first_channel,
    num_patches,
    PATCHES: tl.constexpr,
    PRECISION: tl.constexpr,
    GIVE_X: tl.constexpr,
    GIVE_SCORE: tl.constexpr,
    GIVE_VALUE: tl.constexpr,
):
    """dx (ROWS, PIXELS) of a tile, in float32, and ``gradients`` with the tile's added.

    Gradients of attention and scores stay divided by the power of M, which dx and the sum over the
    programs multiply with in the end.
    """
    dtype: tl.constexpr = x.dtype
    matrices_ptr, constants_ptr = weights
    seed_ptr, _, _ = dropout
    score_grad, value_grad, score_constant_grad, value_constant_grad, out_constant_grad = gradients
    factor = tile_dropout(dropout, image, first_channel, PATCHES)
    if PATCHES > 1:
        query = dot(x, load_matrix(matrices_ptr, True), PRECISION)
        query = (query + load_constants(constants_ptr + SCORE_CONSTANT)).to(dtype)
        score_scale = tl.load(constants_ptr + SCORE_SCALE)
        # [ROWS, ROWS]
        attention = tile_softmax(query, x, num_patches, score_scale, PATCHES, PRECISION)
        dropped = attention * factor

    if GIVE_VALUE:
        if PATCHES > 1:
            attended = dot(dropped.to(dtype), x, PRECISION).to(dtype)
        else:
            attended = (x * factor).to(dtype)
        value_grad += dot(tl.trans(attended), grad, PRECISION)
        out_constant_grad += sum_rows(grad)
        if seed_ptr is not None:
            total = tl.sum(dropped, 1)[:, None] if PATCHES > 1 else factor
            value_constant_grad += sum_weighted_rows(grad, total)

    dx = x
    if GIVE_X or (GIVE_SCORE and PATCHES > 1):
        value_scale = tl.load(constants_ptr + VALUE_SCALE)
        # [ROWS, PIXELS]
        attended_grad = dot(grad, tl.trans(load_matrix(matrices_ptr + MATRIX, True)), PRECISION)
        if PATCHES == 1:
            dx = attended_grad * value_scale * factor
        else:
            attended_grad = attended_grad.to(dtype)
            # [ROWS, ROWS]
            attention_grad = dot(attended_grad, tl.trans(x), PRECISION)
            if seed_ptr is not None:
                value_constant = load_constants(constants_ptr + VALUE_CONSTANT)
                attention_grad += tl.sum(grad * value_constant, 1)[:, None] / value_scale
            attention_grad *= factor
            delta = tl.sum(attention * attention_grad, 1)[:, None]
            scores_grad = (attention * (attention_grad - delta)).to(dtype)
            # [ROWS, PIXELS]
            query_grad = dot(scores_grad, x, PRECISION)
            if GIVE_SCORE:
                score_grad += dot(tl.trans(x), query_grad.to(dtype), PRECISION)
                score_constant_grad += sum_rows(query_grad)
            if GIVE_X:
                score_matrix = tl.trans(load_matrix(matrices_ptr, True))
                dx = dot(tl.trans(scores_grad), query, PRECISION)
                dx += dot(query_grad.to(dtype), score_matrix, PRECISION)
                dx *= score_scale
                dx += dot(tl.trans(dropped.to(dtype)), attended_grad, PRECISION)
                dx *= value_scale
    gradients = (
        score_grad,
        value_grad,
        score_constant_grad,
        value_constant_grad,
        out_constant_grad,
    )
    return dx, gradients


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
        x, folded, seed: as in the forward pass.
        dx: written; gradient (B, H, W, C) of x, in its dtype. Or None.
        folded_grad, bias_grad: written; gradients of ``folded`` and of the bias (N*N,), in float32.
            Or both None.
    """
    needs = (dx is not None, folded_grad is not None)
    with on_device(x.device):
        problem = Problem.of(x, grad.dtype, patch_size, dropout_p)
        matrices, constants = prepare_weights(folded, None, patch_size, grad.dtype)
        attention = {
            "matrices_ptr": matrices,
            "constants_ptr": constants,
            "seed_ptr": seed,
            **problem.attention_arguments(),
        }
        route = backward_route(problem)
        if route == "map":
            partials = _map_backward(x, grad, dx, problem, attention, *needs)
        else:
            tokens, grad_tokens = to_tokens(x, problem), to_tokens(grad, problem)
            backward_of_tokens = flash_backward if route == "flash" else _tokens_backward
            dx_tokens, partials = backward_of_tokens(
                tokens, grad_tokens, problem, attention, *needs
            )
            if dx is not None:
                from_tokens(dx_tokens, problem, dx)
        if folded_grad is not None:
            sum_partials(partials, constants, folded_grad, bias_grad, patch_size)


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
                **attention,
                **backward_pass.map_constants(needs_x, needs_weights),
            )
    return partials


def _tokens_backward(
    tokens: Tensor,
    grad: Tensor,
    problem: Problem,
    attention: dict,
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Tensor, Tensor]:
    """`flash_backward` for up to 64 patches."""
    dx = torch.empty_like(tokens)
    programs = min(PROGRAMS, problem.num_sequences)
    partials = tokens.new_empty((programs, PARTIAL.value), dtype=torch.float32)
    for backward_pass in launched_as(backward_passes, problem):
        if backward_pass.is_needed(needs_x, needs_weights):
            cpsa_tokens_backward_kernel[(programs,)](
                x_ptr=tokens,
                grad_ptr=grad,
                dx_ptr=dx,
                partials_ptr=partials,
                num_sequences=problem.num_sequences,
                **problem.token_arguments(),
                **attention,
                **backward_pass.constants(needs_x, needs_weights),
            )
    return dx, partials
