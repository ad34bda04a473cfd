"""Tiles of the map, and attention among the tokens of one, for up to 64 patches of up to 7 x 7.

Such a patch leaves coordinates of its token unused. Two of them are 1: two rows of A and M are then
what is added to x A and to x M (`weights`), and two columns of their gradients what those get.
"""

import triton
import triton.language as tl

from catkernels.kernels.cpsa.tiles import GRID, PIXELS, dropout_factor
from catkernels.kernels.tiles import LOG2E, dot

ROWS = tl.constexpr(64)  # tokens in a tile: what one warp group multiplies at a time


@triton.jit
def map_tile(
    map_size,
    first_patch,
    first_channel,
    PATCHES_HIGH: tl.constexpr,
    PATCHES_LOW: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    FULL: tl.constexpr,
    PADDED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Offsets into an image, and mask: (PATCHES_HIGH * GRID, PATCHES_LOW * GRID * BLOCK_C) pixels.

    Axis 0, (high patch, x), is what one thread owns: the transposition to tokens then moves no
    data. Axis 1, (low patch, y, channel), goes over the threads, by 16 bytes of neighbours where it
    can. There are two axes because versions of Triton order more of them differently. ``map_size``
    is the height, the width and the number of patches; FULL says that every patch exists.
    """
    height, width, num_patches = map_size
    own = tl.arange(0, PATCHES_HIGH * GRID)[:, None]
    other = tl.arange(0, PATCHES_LOW * GRID * BLOCK_C)[None, :]
    x = own % GRID
    y = other // BLOCK_C % GRID
    channel = first_channel + other % BLOCK_C
    patch = first_patch + own // GRID * PATCHES_LOW + other // (BLOCK_C * GRID)

    columns = tl.cdiv(width, PATCH)
    row = patch // columns * PATCH + y
    column = patch % columns * PATCH
    mask = (x < PATCH) & (y < PATCH)
    if not FULL:
        mask = mask & (patch < num_patches)
    if PADDED:
        mask = mask & (row < height) & (column + x < width)
    if CHANNELS % BLOCK_C != 0:
        mask = mask & (channel < CHANNELS)
    if WIDE:
        row = row.to(tl.int64)
    # in 64 bits, because x is then part of the instruction and takes no register
    offset = ((row * width + column) * CHANNELS + channel).to(tl.int64)
    return offset + (x * CHANNELS).to(tl.int64), mask


@triton.jit
def normed_tile(
    tile,
    inside,
    norm,
    map_size,
    first_channel,
    PATCHES_HIGH: tl.constexpr,
    PATCHES_LOW: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    FULL: tl.constexpr,
    PADDED: tl.constexpr,
):
    """The layer norm of a map tile from its first patch on, in float32; zero where no pixel is.

    ``norm`` is the pointers to the image's means and inverse deviations (H, W, 2), to the weight
    and to the bias, and the 2: known at run time only, it keeps Triton from giving a thread the
    statistics of neighbours, whose layout is not the tile's.
    """
    statistics_ptr, weight_ptr, bias_ptr, stride = norm
    # a map of one channel, the pixels
    pixel, real = map_tile(
        map_size, 0, 0, PATCHES_HIGH, PATCHES_LOW, 1, 1, PATCH, FULL, PADDED, False
    )
    # [PATCHES_HIGH * GRID, PATCHES_LOW * GRID]
    mean = tl.load(statistics_ptr + pixel * stride, mask=real, other=0.0)
    rstd = tl.load(statistics_ptr + pixel * stride + 1, mask=real, other=0.0)
    channel = first_channel + tl.arange(0, BLOCK_C)
    is_channel = channel < CHANNELS
    # [BLOCK_C]
    weight = tl.load(weight_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    # [PATCHES_HIGH * GRID, PATCHES_LOW * GRID, BLOCK_C]
    x = tl.reshape(tile, (PATCHES_HIGH * GRID, PATCHES_LOW * GRID, BLOCK_C)).to(tl.float32)
    normed = (x - mean[:, :, None]) * rstd[:, :, None] * weight[None, None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
        normed += bias[None, None, :]
    # padding follows the norm: it is zero, and not the norm of zeros
    return tl.where(inside, tl.reshape(normed, tile.shape), 0.0)


@triton.jit
def with_ones(tile, BLOCK_C: tl.constexpr):
    """A map tile whose tokens are 1 at the coordinates (x 7, y 6) and (x 7, y 7)."""
    x = tl.arange(0, tile.shape[0])[:, None] % GRID
    y = tl.arange(0, tile.shape[1])[None, :] // BLOCK_C % GRID
    one = (x == GRID - 1) & (y >= GRID - 2)
    return tl.where(one, one.to(tl.float32).to(tile.dtype), tile)


@triton.jit
def to_groups(tile, GROUPS: tl.constexpr, PATCHES_HIGH: tl.constexpr, PATCHES_LOW: tl.constexpr):
    """A map tile as a tuple of groups of tokens (ROWS, PIXELS), as many channels each.

    Channels are the fastest among a group's rows: a warp then stores operands by 8 bytes or more.
    All groups are made at once: each goes to shared memory where it is made, so that those which
    wait for their turn hold no registers.
    """
    EACH: tl.constexpr = ROWS // (PATCHES_HIGH * PATCHES_LOW)
    if tile.dtype.primitive_bitwidth == 16:
        bits = tile.to(tl.int16, bitcast=True).to(tl.int32)
    else:
        bits = tile.to(tl.int32, bitcast=True)
    bits = tl.reshape(bits, (PATCHES_HIGH, GRID, PATCHES_LOW, GRID, GROUPS, EACH))
    bits = tl.reshape(tl.permute(bits, (4, 0, 2, 5, 3, 1)), (GROUPS, ROWS, PIXELS))
    groups = (_group(bits, 0, tile.dtype),)
    for group in tl.static_range(1, GROUPS):
        groups += (_group(bits, group, tile.dtype),)
    return groups


@triton.jit
def _group(bits, GROUP: tl.constexpr, DTYPE: tl.constexpr):
    """One group (ROWS, PIXELS) of the bits of all (GROUPS, ROWS, PIXELS).

    It is a sum of integers, which costs no more than a choice of registers: the compiler cannot
    carry the layouts of the products through it, back to the tile of all the groups.
    """
    group = tl.arange(0, bits.shape[0])[:, None, None]
    chosen = tl.sum(tl.where(group == GROUP, bits, 0), 0)
    if DTYPE.primitive_bitwidth == 16:
        return chosen.to(tl.int16).to(DTYPE, bitcast=True)
    else:
        return chosen.to(DTYPE, bitcast=True)


@triton.jit
def put_group(groups, tokens, GROUP: tl.constexpr):
    """Groups (GROUPS, ROWS, PIXELS) of which one is replaced by ``tokens``."""
    group = tl.arange(0, groups.shape[0])[:, None, None]
    return tl.where(group == GROUP, tokens.to(groups.dtype)[None], groups)


@triton.jit
def from_groups(
    groups, GROUPS: tl.constexpr, PATCHES_HIGH: tl.constexpr, PATCHES_LOW: tl.constexpr
):
    """Groups of tokens (GROUPS, ROWS, PIXELS) as a map tile."""
    EACH: tl.constexpr = ROWS // (PATCHES_HIGH * PATCHES_LOW)
    tile = tl.reshape(groups, (GROUPS, PATCHES_HIGH, PATCHES_LOW, EACH, GRID, GRID))
    tile = tl.permute(tile, (1, 5, 2, 4, 0, 3))
    return tl.reshape(tile, (PATCHES_HIGH * GRID, PATCHES_LOW * GRID * GROUPS * EACH))


@triton.jit
def tile_query(x, score_matrix, PRECISION: tl.constexpr):
    """Queries x A (ROWS, PIXELS), by a product whose right factor is x.

    A right factor has one copy, in shared memory. Of a left one that no load made Triton makes a
    second in shared memory, and a third in registers.
    """
    return tl.trans(dot(tl.trans(score_matrix), tl.trans(x), PRECISION).to(x.dtype))


@triton.jit
def tile_softmax(
    query,
    x,
    num_patches,
    score_scale,
    PATCHES: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention weights (ROWS, ROWS) among the tokens of each channel of a tile, in float32."""
    patch, channel = _tile_rows(PATCHES)
    scores = dot(query, tl.trans(x), PRECISION)
    # only columns are masked: a padded row keeps its channel's keys, so that no row is empty
    if not FULL:
        scores = tl.where((patch < num_patches)[None, :], scores, -float("inf"))
    if PATCHES < ROWS:
        scores = tl.where(channel[:, None] == channel[None, :], scores, -float("inf"))
    scale = score_scale * LOG2E
    weights = tl.exp2(scores * scale - (tl.max(scores, 1) * scale)[:, None])
    return weights * (1.0 / tl.sum(weights, 1))[:, None]


@triton.jit
def tile_dropout(dropout, image, first_channel, PATCHES: tl.constexpr):
    """`dropout_factor` of a tile: (ROWS, ROWS), or (ROWS, 1) for one patch."""
    patch, channel = _tile_rows(PATCHES)
    key = patch if PATCHES > 1 else tl.zeros([1], tl.int32)
    return dropout_factor(dropout, image, first_channel + channel, patch, 0, key)


@triton.jit
def _tile_rows(PATCHES: tl.constexpr):
    """The patch and the channel, within its group, of each row of a tile."""
    row = tl.arange(0, ROWS)
    return row // (ROWS // PATCHES), row % (ROWS // PATCHES)
