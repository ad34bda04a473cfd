"""CPSA forward. Of up to 64 patches the map is read once and written once; more go through tokens.

A tile holds 64 tokens: all the patches of one channel, or of several that attend block-diagonally.
"""

import triton
import triton.language as tl
from torch import Tensor

from catkernels.kernels.cpsa.flash_forward import flash_forward
from catkernels.kernels.cpsa.launch import Problem, forward_launch, forward_route
from catkernels.kernels.cpsa.tiles import (
    ROWS,
    from_groups,
    get_group,
    map_tile,
    put_group,
    tile_dropout,
    tile_softmax,
    to_groups,
)
from catkernels.kernels.cpsa.tokens import from_tokens, to_tokens
from catkernels.kernels.cpsa.weights import (
    MATRIX,
    OUT_CONSTANT,
    SCORE_CONSTANT,
    SCORE_SCALE,
    VALUE_CONSTANT,
    VALUE_SCALE,
    load_constants,
    load_matrix,
    prepare_weights,
)
from catkernels.kernels.launch import launched_as, on_device
from catkernels.kernels.tiles import dot


@triton.jit
def cpsa_map_forward_kernel(
    x_ptr,
    matrices_ptr,
    constants_ptr,
    seed_ptr,
    out_ptr,
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
    RELOAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = softmax((x A + u) x^T) x M + c of some channels of an image.

    Grid: (images * blocks of channels,)
    Writes: out_ptr (B, H, W, C).
    """
    PATCHES: tl.constexpr = PATCHES_HIGH * PATCHES_LOW
    GROUPS: tl.constexpr = BLOCK_C * PATCHES // ROWS
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    dtype: tl.constexpr = matrices_ptr.dtype.element_ty
    image = tl.program_id(0) // BLOCKS
    first_channel = tl.program_id(0) % BLOCKS * BLOCK_C

    map_size = (height, width, num_patches)
    weights = (matrices_ptr, constants_ptr)
    dropout = (seed_ptr, drop_threshold, keep_scale)
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
    # [GROUPS, ROWS, PIXELS]
    x_groups = to_groups(x, GROUPS, PATCHES_HIGH, PATCHES_LOW)
    out = tl.zeros((GROUPS, ROWS, x_groups.shape[2]), out_ptr.dtype.element_ty)
    for group in tl.static_range(GROUPS):
        attended = _attend_tile(
            get_group(x_groups, group, dtype),
            weights,
            dropout,
            image,
            first_channel + group * (ROWS // PATCHES),
            num_patches,
            PATCHES,
            RELOAD,
            PRECISION,
        )
        out = put_group(out, attended, group)
    out = from_groups(out, GROUPS, PATCHES_HIGH, PATCHES_LOW)
    tl.store(out_ptr + image_start + offset, out, mask=inside)


@triton.jit
def _attend_tile(
    x,
    weights,
    dropout,
    image,
    first_channel,
    num_patches,
    PATCHES: tl.constexpr,
    RELOAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """CPSA of the tokens (ROWS, PIXELS) of a tile, in float32."""
    matrices_ptr, constants_ptr = weights
    seed_ptr, _, _ = dropout
    factor = tile_dropout(dropout, image, first_channel, PATCHES)
    if PATCHES > 1:
        query = dot(x, load_matrix(matrices_ptr, RELOAD), PRECISION)
        query = (query + load_constants(constants_ptr + SCORE_CONSTANT)).to(x.dtype)
        score_scale = tl.load(constants_ptr + SCORE_SCALE)
        # [ROWS, ROWS]
        attention = tile_softmax(query, x, num_patches, score_scale, PATCHES, PRECISION) * factor
        total = tl.sum(attention, 1)[:, None]
        attended = dot(attention.to(x.dtype), x, PRECISION).to(x.dtype)
    else:
        total = factor
        attended = (x * factor).to(x.dtype)

    # [ROWS, PIXELS]
    out = dot(attended, load_matrix(matrices_ptr + MATRIX, RELOAD), PRECISION)
    out = out * tl.load(constants_ptr + VALUE_SCALE) + load_constants(constants_ptr + OUT_CONSTANT)
    if seed_ptr is not None:
        out += (total - 1.0) * load_constants(constants_ptr + VALUE_CONSTANT)
    return out


def cpsa_forward(
    x: Tensor,
    folded: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    patch_size: int,
    dropout_p: float,
) -> None:
    """CPSA with folded weights, computed in the dtype of ``out``. All tensors are contiguous.

    Args:
        x: map (B, H, W, C), of any floating dtype.
        folded: float32 (2, N*N + 1, N*N), see `catkernels.reference.fold_weights`.
        bias: float32 (N*N,) of the outputs, or None.
        seed: int64 (1,) of the dropout, or None for none.
        out: written; (B, H, W, C).
    """
    with on_device(x.device):
        problem = Problem.of(x, out.dtype, patch_size, dropout_p)
        matrices, constants = prepare_weights(folded, bias, patch_size, out.dtype)
        attention = {
            "matrices_ptr": matrices,
            "constants_ptr": constants,
            "seed_ptr": seed,
            **problem.attention_arguments(),
        }
        if forward_route(problem) == "flash":
            tokens = to_tokens(x, problem)
            from_tokens(flash_forward(tokens, problem, attention), problem, out)
            return
        launch = launched_as(forward_launch, problem)
        blocks = triton.cdiv(problem.channels, launch.block_c)
        cpsa_map_forward_kernel[(problem.batch * blocks,)](
            x_ptr=x,
            out_ptr=out,
            **problem.map_arguments(),
            **attention,
            **launch.constants(),
        )
