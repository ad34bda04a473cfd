"""Tokens (B*C, P, 64): every channel's patches as rows, for kernels that cannot hold map tiles."""

import triton
import triton.language as tl
from torch import Tensor

from catkernels.kernels.cpsa.launch import COPY_CHANNELS, COPY_PATCHES, Problem
from catkernels.kernels.cpsa.map_tiles import map_tile
from catkernels.kernels.cpsa.tiles import COUNTS, GRID, PIXELS


@triton.jit
def token_offsets(first_patch, num_patches, ROWS: tl.constexpr):
    """Offsets (ROWS, PIXELS) from a sequence's first token, and their mask (ROWS, 1)."""
    patch = first_patch + tl.arange(0, ROWS)[:, None]
    pixel = tl.arange(0, PIXELS)[None, :]
    return patch * PIXELS + pixel, patch < num_patches


@triton.jit
def load_tokens(tokens_ptr, sequence, first_patch, num_patches, ROWS: tl.constexpr):
    """Rows (ROWS, PIXELS) of a sequence, zeros after its last patch."""
    offset, inside = token_offsets(first_patch, num_patches, ROWS)
    start = tl.cast(sequence, tl.int64) * num_patches * PIXELS
    return tl.load(tokens_ptr + start + offset, mask=inside, other=0.0)


@triton.jit
def store_tokens(tokens_ptr, tokens, sequence, first_patch, num_patches):
    """Store rows (ROWS, PIXELS) of a sequence, up to its last patch."""
    offset, inside = token_offsets(first_patch, num_patches, tokens.shape[0])
    start = tl.cast(sequence, tl.int64) * num_patches * PIXELS
    tl.store(tokens_ptr + start + offset, tokens.to(tokens_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def cpsa_copy_tokens_kernel(
    map_ptr,
    tokens_ptr,
    height,
    width,
    num_patches,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    PATCHES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PADDED: tl.constexpr,
    WIDE: tl.constexpr,
    TO_MAP: tl.constexpr,
):
    """tokens = patches of the map, or with TO_MAP the inverse.

    Grid: (images * blocks of patches * blocks of channels,), channels fastest
    Writes: tokens_ptr (B*C, P, 64), zeros beside the patches; with TO_MAP map_ptr (B, H, W, C).
    """
    channel_blocks: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    patch_blocks = tl.cdiv(num_patches, PATCHES)
    first_channel = tl.program_id(0) % channel_blocks * BLOCK_C
    first_patch = tl.program_id(0) // channel_blocks % patch_blocks * PATCHES
    image = tl.cast(tl.program_id(0) // channel_blocks // patch_blocks, tl.int64)

    map_size = (height, width, num_patches)
    map_ptr += image * height * width * CHANNELS
    # [GRID, PATCHES * GRID * BLOCK_C]
    offset, inside = map_tile(
        map_size,
        first_patch,
        first_channel,
        1,
        PATCHES,
        BLOCK_C,
        CHANNELS,
        PATCH,
        False,
        PADDED,
        WIDE,
    )
    # [BLOCK_C, PATCHES, PIXELS]
    channel = tl.arange(0, BLOCK_C)[:, None, None]
    patch = tl.arange(0, PATCHES)[None, :, None]
    pixel = tl.arange(0, PIXELS)[None, None, :]
    tokens_ptr += ((image * CHANNELS + first_channel) * num_patches + first_patch) * PIXELS
    token_offset = (channel * num_patches + patch) * PIXELS + pixel
    inside_tokens = (first_patch + patch < num_patches) & (first_channel + channel < CHANNELS)
    if TO_MAP:
        tokens = tl.load(tokens_ptr + token_offset, mask=inside_tokens, other=0.0)
        tile = tl.permute(tl.reshape(tokens, (BLOCK_C, PATCHES, GRID, GRID)), (3, 1, 2, 0))
        tile = tl.reshape(tile, (GRID, PATCHES * GRID * BLOCK_C))
        tl.store(map_ptr + offset, tile.to(map_ptr.dtype.element_ty), mask=inside)
    else:
        tile = tl.load(map_ptr + offset, mask=inside, other=0.0)
        tile = tl.permute(tl.reshape(tile, (GRID, PATCHES, GRID, BLOCK_C)), (3, 1, 2, 0))
        tokens = tl.reshape(tile, (BLOCK_C, PATCHES, PIXELS))
        tl.store(
            tokens_ptr + token_offset, tokens.to(tokens_ptr.dtype.element_ty), mask=inside_tokens
        )


def to_tokens(x: Tensor, problem: Problem) -> Tensor:
    """The tokens (B*C, P, 64), in the problem's dtype, of a contiguous map (B, H, W, C)."""
    size = (problem.num_sequences, problem.num_patches, PIXELS.value)
    tokens = x.new_empty(size, dtype=problem.dtype)
    _copy_tokens(x, tokens, problem, to_map=False)
    return tokens


def from_tokens(tokens: Tensor, problem: Problem, out: Tensor) -> None:
    """Write tokens (B*C, P, 64) to the contiguous map ``out`` (B, H, W, C)."""
    _copy_tokens(out, tokens, problem, to_map=True)


def _copy_tokens(x: Tensor, tokens: Tensor, problem: Problem, to_map: bool) -> None:
    blocks = triton.cdiv(problem.channels, COPY_CHANNELS)
    blocks *= triton.cdiv(problem.num_patches, COPY_PATCHES)
    cpsa_copy_tokens_kernel[(problem.batch * blocks,)](
        map_ptr=x,
        tokens_ptr=tokens,
        **problem.map_arguments(),
        PATCHES=COPY_PATCHES,
        BLOCK_C=COPY_CHANNELS,
        TO_MAP=to_map,
        num_warps=4,
    )
