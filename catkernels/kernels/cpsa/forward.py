"""CPSA forward. Of up to 64 patches the map is read once and written once; more go through tokens.

A tile holds 64 tokens: all the patches of one channel, or of several that attend block-diagonally.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from catkernels.kernels.cpsa.flash_forward import flash_forward
from catkernels.kernels.cpsa.fold import fold_weights
from catkernels.kernels.cpsa.launch import Problem, forward_launch, route
from catkernels.kernels.cpsa.map_tiles import (
    ROWS,
    from_groups,
    map_tile,
    normed_tile,
    put_group,
    tile_dropout,
    tile_query,
    tile_softmax,
    to_groups,
    with_ones,
)
from catkernels.kernels.cpsa.tiles import COUNTS, PIXELS
from catkernels.kernels.cpsa.tokens import from_tokens, to_tokens
from catkernels.kernels.cpsa.weights import (
    BIAS,
    MATRIX,
    SCORE_SCALE,
    VALUE_SCALE,
    load_constants,
    load_matrix,
)
from catkernels.kernels.launch import launched_as, on_device
from catkernels.kernels.tiles import dot


@triton.jit(do_not_specialize=COUNTS)
def cpsa_map_forward_kernel(
    x_ptr,
    matrices_ptr,
    constants_ptr,
    seed_ptr,
    statistics_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    factor_ptr,
    out_ptr,
    statistics_stride,
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
    PRECISION: tl.constexpr,
):
    """out = softmax(x A x^T) x M of some channels of an image; x has coordinates that are 1.

    With dropout M's constant is Wp bv, which is dropped with the values; the bias is added.

    Given the mean and inverse deviation of each pixel (B, H, W, 2), x is the map after its layer
    norm, and the map itself is added: ``map + factor out``, with a factor for each image.

    Grid: (images * blocks of channels,)
    Writes: out_ptr (B, H, W, C).
    """
    PATCHES: tl.constexpr = PATCHES_HIGH * PATCHES_LOW
    GROUPS: tl.constexpr = BLOCK_C * PATCHES // ROWS
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    dtype: tl.constexpr = matrices_ptr.dtype.element_ty
    image = tl.program_id(0) // BLOCKS
    first_channel = tl.program_id(0) % BLOCKS * BLOCK_C
    dropout = (seed_ptr, drop_threshold, keep_scale)
    image_start = tl.cast(image, tl.int64) * height * width * CHANNELS
    # [PATCHES_HIGH * GRID, PATCHES_LOW * GRID * BLOCK_C]
    offset, inside = map_tile(
        (height, width, num_patches),
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
    x = tl.load(x_ptr + image_start + offset, mask=inside, other=0.0)
    if statistics_ptr is not None:
        image_statistics = statistics_ptr + tl.cast(image, tl.int64) * height * width * 2
        x = normed_tile(
            x,
            inside,
            (image_statistics, norm_weight_ptr, norm_bias_ptr, statistics_stride),
            (height, width, num_patches),
            first_channel,
            PATCHES_HIGH,
            PATCHES_LOW,
            BLOCK_C,
            CHANNELS,
            PATCH,
            FULL,
            PADDED,
        )
    x = x.to(dtype)
    score_scale = tl.load(constants_ptr + SCORE_SCALE)
    value_scale = tl.load(constants_ptr + VALUE_SCALE)
    # [PIXELS, PIXELS]
    score_matrix = load_matrix(matrices_ptr)
    value_matrix = load_matrix(matrices_ptr + MATRIX)
    # GROUPS times [ROWS, PIXELS]
    groups = to_groups(with_ones(x, BLOCK_C), GROUPS, PATCHES_HIGH, PATCHES_LOW)
    # [GROUPS, ROWS, PIXELS]
    out = tl.zeros((GROUPS, ROWS, PIXELS), dtype)
    for group in tl.static_range(GROUPS):
        tokens = groups[group]
        factor = tile_dropout(dropout, image, first_channel + group * (ROWS // PATCHES), PATCHES)
        # [ROWS, PIXELS]
        if PATCHES > 1:
            query = tile_query(tokens, score_matrix, PRECISION)
            # [ROWS, ROWS]
            attention = tile_softmax(
                query, tokens, num_patches, score_scale, PATCHES, FULL, PRECISION
            )
            attended = dot((attention * factor).to(dtype), tokens, PRECISION).to(dtype)
            group_out = dot(attended, value_matrix, PRECISION) * value_scale
        else:
            group_out = dot(tokens, value_matrix, PRECISION) * value_scale * factor
        if seed_ptr is not None:
            group_out += load_constants(constants_ptr + BIAS)
        out = put_group(out, group_out, group)
    out = from_groups(out, GROUPS, PATCHES_HIGH, PATCHES_LOW)
    if statistics_ptr is not None:
        out = out.to(tl.float32)
        if factor_ptr is not None:
            out *= tl.load(factor_ptr + image).to(tl.float32)
        # from the second-level cache, by another eviction policy: it was not held meanwhile
        again = tl.load(
            x_ptr + image_start + offset, mask=inside, other=0.0, eviction_policy="evict_first"
        )
        out = (out + again.to(tl.float32)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + image_start + offset, out, mask=inside)


# Around the attention are neither norm nor residual.
ALONE = {
    "statistics_ptr": None,
    "norm_weight_ptr": None,
    "norm_bias_ptr": None,
    "factor_ptr": None,
    "statistics_stride": None,
}


def cpsa_forward(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    patch_size: int,
    scale: float,
    dropout_p: float,
) -> None:
    """CPSA computed in the dtype of ``out``. All tensors are contiguous.

    Args:
        x: map (B, H, W, C), of any floating dtype.
        qkv_weight, qkv_bias, proj_weight, proj_bias: each of any floating dtype up to float32.
        seed: int64 (1,) of the dropout, or None for none.
        out: written; (B, H, W, C).
    """
    with on_device(x.device):
        problem = Problem.of(x, out.dtype, patch_size, dropout_p)
        weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)
        attention = _attention_arguments(problem, weights, scale, seed)
        if route(problem, backward=False) == "flash":
            tokens = to_tokens(x, problem)
            from_tokens(flash_forward(tokens, problem, attention), problem, out)
            return
        _launch_on_map(x, out, problem, attention, ALONE)


def cpsa_residual(
    x: Tensor,
    statistics: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    factor: Tensor | None,
    out: Tensor,
    patch_size: int,
    scale: float,
    dtype: torch.dtype,
) -> None:
    """``x + factor CPSA(norm(x))``, for up to 64 patches. All tensors are contiguous.

    Args:
        x: map (B, H, W, C), of any floating dtype.
        statistics: float32 (B, H, W, 2), of `catkernels.kernels.dense.norm.row_statistics`.
        norm_weight, norm_bias: (C,); no bias is zeros.
        qkv_weight, qkv_bias, proj_weight, proj_bias: each of any floating dtype up to float32.
        factor: (B,), what each image's branch is multiplied with, or None.
        out: written; like x.
        dtype: of the products.
    """
    with on_device(x.device):
        problem = Problem.of(x, dtype, patch_size, dropout_p=0.0)
        weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)
        attention = _attention_arguments(problem, weights, scale, seed=None)
        around = {
            "statistics_ptr": statistics,
            "norm_weight_ptr": norm_weight,
            "norm_bias_ptr": norm_bias,
            "factor_ptr": factor,
            "statistics_stride": 2,
        }
        _launch_on_map(x, out, problem, attention, around)


def _attention_arguments(
    problem: Problem, weights: tuple[Tensor | None, ...], scale: float, seed: Tensor | None
) -> dict[str, Any]:
    """What kernels are given to attend with these weights, which are folded for them."""
    sizes = (scale, problem.patch_size, problem.dtype)
    matrices, constants = fold_weights(*weights, *sizes, "out" if seed is None else "values")
    return {
        "matrices_ptr": matrices,
        "constants_ptr": constants,
        "seed_ptr": seed,
        **problem.attention_arguments(),
    }


def _launch_on_map(
    x: Tensor, out: Tensor, problem: Problem, attention: dict[str, Any], around: dict[str, Any]
) -> None:
    """Launch `cpsa_map_forward_kernel`; ``around`` is the norm and the residual, or `ALONE`."""
    launch = launched_as(forward_launch, problem)
    blocks = triton.cdiv(problem.channels, launch.block_c)
    cpsa_map_forward_kernel[(problem.batch * blocks,)](
        x_ptr=x,
        out_ptr=out,
        **problem.map_arguments(),
        FULL=problem.fills_tiles,
        **attention,
        **around,
        **launch.constants(),
    )
