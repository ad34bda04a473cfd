"""What the CPSA kernels share: where patches lie on a map, and attention among a tile of them.

A patch of N x N pixels is one token. It is laid on a grid of 8 x 8 pixels, so that a token has 64
coordinates for every N up to 8; those beside the patch are zero and stay zero.

The weights come folded (`catkernels.reference.fold_weights`): keys and values are the tokens
themselves: ``query = x A + u``, ``out = softmax(query x^T) x M + c``. See `weights` for how A
and M are scaled.
"""

import triton
import triton.language as tl

from catkernels.kernels.tiles import LOG2E, dot, keep_word

GRID = tl.constexpr(8)  # pixels on a side of the grid that a patch is laid on
PIXELS = tl.constexpr(64)
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
    PADDED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Offsets into an image, and mask, of some patches: axes (high, x, low, y, channel).

    Channels are the fastest axis, so that a thread moves 16 bytes of neighbours. x is a slow axis,
    so that a thread owns whole rows of pixels and the transposition to tokens moves no data.
    ``map_size`` is the height, the width and the number of patches.
    """
    height, width, num_patches = map_size
    high = tl.arange(0, PATCHES_HIGH)[:, None, None, None, None]
    x = tl.arange(0, GRID)[None, :, None, None, None]
    low = tl.arange(0, PATCHES_LOW)[None, None, :, None, None]
    y = tl.arange(0, GRID)[None, None, None, :, None]
    channel = first_channel + tl.arange(0, BLOCK_C)[None, None, None, None, :]

    columns = tl.cdiv(width, PATCH)
    patch = first_patch + high * PATCHES_LOW + low
    row = patch // columns * PATCH + y
    column = patch % columns * PATCH + x
    mask = (x < PATCH) & (y < PATCH) & (patch < num_patches)
    if PADDED:
        mask = mask & (row < height) & (column < width)
    if CHANNELS % BLOCK_C != 0:
        mask = mask & (channel < CHANNELS)
    if WIDE:
        row = row.to(tl.int64)
    return (row * width + column) * CHANNELS + channel, mask


@triton.jit
def to_groups(tile, GROUPS: tl.constexpr, PATCHES_HIGH: tl.constexpr, PATCHES_LOW: tl.constexpr):
    """The bits of a map tile as groups of tokens (GROUPS, ROWS, PIXELS).

    Channels are the fastest among a group's rows: a warp then stores operands by 8 bytes or more.
    """
    CHANNELS_EACH: tl.constexpr = ROWS // (PATCHES_HIGH * PATCHES_LOW)
    tile = tl.reshape(_bits(tile), (PATCHES_HIGH, GRID, PATCHES_LOW, GRID, GROUPS, CHANNELS_EACH))
    return tl.reshape(tl.permute(tile, (4, 0, 2, 5, 3, 1)), (GROUPS, ROWS, PIXELS))


@triton.jit
def from_groups(
    groups, GROUPS: tl.constexpr, PATCHES_HIGH: tl.constexpr, PATCHES_LOW: tl.constexpr
):
    """Groups of tokens (GROUPS, ROWS, PIXELS) as a map tile."""
    CHANNELS_EACH: tl.constexpr = ROWS // (PATCHES_HIGH * PATCHES_LOW)
    tile = tl.reshape(groups, (GROUPS, PATCHES_HIGH, PATCHES_LOW, CHANNELS_EACH, GRID, GRID))
    tile = tl.permute(tile, (1, 5, 2, 4, 0, 3))
    return tl.reshape(tile, (PATCHES_HIGH, GRID, PATCHES_LOW, GRID, GROUPS * CHANNELS_EACH))


@triton.jit
def _bits(tile):
    if tile.dtype.primitive_bitwidth == 16:
        return tile.to(tl.int16, bitcast=True).to(tl.int32)
    else:
        return tile.to(tl.int32, bitcast=True)


@triton.jit
def get_group(groups_bits, GROUP: tl.constexpr, DTYPE: tl.constexpr):
    """One group (ROWS, PIXELS) of `to_groups`.

    It is a sum of integers, which costs no more than a choice of registers: the compiler cannot
    carry the layouts of the products through it, back to the tile of all the groups.
    """
    group = tl.arange(0, groups_bits.shape[0])[:, None, None]
    chosen = tl.sum(tl.where(group == GROUP, groups_bits, 0), 0)
    if DTYPE.primitive_bitwidth == 16:
        return chosen.to(tl.int16).to(DTYPE, bitcast=True)
    else:
        return chosen.to(DTYPE, bitcast=True)


@triton.jit
def put_group(groups, tokens, GROUP: tl.constexpr):
    """``groups`` with one group replaced by ``tokens``."""
    group = tl.arange(0, groups.shape[0])[:, None, None]
    return tl.where(group == GROUP, tokens.to(groups.dtype)[None], groups)


@triton.jit
def tile_rows(PATCHES: tl.constexpr):
    """The patch and the channel, within its group, of each row of a tile."""
    row = tl.arange(0, ROWS)
    return row // (ROWS // PATCHES), row % (ROWS // PATCHES)


@triton.jit
def tile_softmax(
    query, x, num_patches, score_scale, PATCHES: tl.constexpr, PRECISION: tl.constexpr
):
    """Attention weights (ROWS, ROWS) among the tokens of each channel of a tile, in float32."""
    patch, channel = tile_rows(PATCHES)
    scores = dot(query, tl.trans(x), PRECISION) * (score_scale * LOG2E)
    # only columns are masked: a padded row keeps its channel's keys, so that no row is empty
    valid = (patch < num_patches)[None, :]
    if PATCHES < ROWS:
        valid = valid & (channel[:, None] == channel[None, :])
    scores = tl.where(valid, scores, -float("inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return weights * (1.0 / tl.sum(weights, 1))[:, None]


@triton.jit
def tile_dropout(dropout, image, first_channel, PATCHES: tl.constexpr):
    """`dropout_factor` of a tile: (ROWS, ROWS), or (ROWS, 1) for one patch."""
    patch, channel = tile_rows(PATCHES)
    key = patch if PATCHES > 1 else tl.zeros([1], tl.int32)
    return dropout_factor(dropout, image, first_channel + channel, patch, 0, key)


@triton.jit
def dropout_factor(dropout, image, channel, query, first_key, key):
    """What dropout multiplies attention weights (QUERIES, KEYS) by, from their place in the layer.

    ``dropout`` is the pointer to the seed, None for no dropout, the threshold, and the scale of
    what is kept. ``channel`` and ``query`` are (QUERIES,); the keys are ``first_key + key``, with
    key below 64.
    """
    seed_ptr, drop_threshold, keep_scale = dropout
    if seed_ptr is None:
        return 1.0
    else:
        seed = tl.load(seed_ptr)
        images = image + tl.zeros([query.shape[0]], tl.int32)
        lower = keep_word(seed, drop_threshold, first_key, query, channel, images)[:, None]
        upper = keep_word(seed, drop_threshold, first_key + 32, query, channel, images)[:, None]
        word = tl.where((key < 32)[None, :], lower, upper)
        return tl.where(((word >> (key % 32)[None, :]) & 1) != 0, keep_scale, 0.0)
