"""Windows as tiles: how a tile of tokens lies on the map, and what it loads from there.

A tile is 64 tokens: one window of 36 to 64 pixels, or several smaller windows one after another
that attend block-diagonally. Its tokens are addressed on the map itself; nothing is partitioned.
What is not finite in one window reaches no other.
"""

import triton
import triton.language as tl

from catkernels.kernels.tiles import dot, keep_word

# Arguments that count. Compiling for what they are (1, or a multiple of 16) would make no address
# better aligned, since channels come in heads, but would compile anew for other batches.
COUNTS = ["height", "width", "num_heads", "num_windows", "num_pixels", "drop_threshold"]


@triton.jit
def window_position(
    tile, height, width, PATCH: tl.constexpr, WINDOWS: tl.constexpr, TILE: tl.constexpr
):
    """Image, top and left of the window of each token of a tile, and the token's y and x in it.

    The window's are scalars for a tile of one window and [TILE] for several, the token's [TILE].
    """
    PIXELS: tl.constexpr = PATCH * PATCH
    token = tl.arange(0, TILE)
    window = tile
    if WINDOWS > 1:
        window = tile * WINDOWS + token // PIXELS
    columns = tl.cdiv(width, PATCH)
    rows = tl.cdiv(height, PATCH)
    image = window // (rows * columns)
    top = window // columns % rows * PATCH
    left = window % columns * PATCH
    return image, top, left, token % PIXELS // PATCH, token % PIXELS % PATCH


@triton.jit
def window_pixels(
    tile,
    height,
    width,
    num_windows,
    PATCH: tl.constexpr,
    WINDOWS: tl.constexpr,
    TILE: tl.constexpr,
    PADDED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Where the tokens of a tile lie on the map.

    Returns:
        window_pixel: index of the window's first pixel on the (B, H, W) map, int64; a scalar for a
            tile of one window, [TILE] for several.
        offset: [TILE], from there to the token's pixel; int64 where ``WIDE``.
        inside: [TILE], whether the token is a pixel of the map.
        is_token: [TILE], whether the token is a pixel of a window, inside or beside the map.
    """
    PIXELS: tl.constexpr = PATCH * PATCH
    image, top, left, y, x = window_position(tile, height, width, PATCH, WINDOWS, TILE)
    token = tl.arange(0, TILE)
    is_token = token < WINDOWS * PIXELS
    if WINDOWS > 1:
        is_token &= tile * WINDOWS + token // PIXELS < num_windows
    inside = is_token
    if PADDED:
        inside = is_token & (top + y < height) & (left + x < width)
    window_pixel = (tl.cast(image, tl.int64) * height + top) * width + left
    row = y.to(tl.int64) if WIDE else y
    return window_pixel, row * width + x, inside, is_token


@triton.jit
def padding_rows(
    tile, height, width, PATCH: tl.constexpr, WINDOWS: tl.constexpr, TILE: tl.constexpr
):
    """Number [TILE], int64, of each token among the padded pixels of all images; for those only.

    In an image the pixels to the right of the map come first, row by row, then those below it.
    """
    image, top, left, y, x = window_position(tile, height, width, PATCH, WINDOWS, TILE)
    y += top
    x += left
    right = tl.cdiv(width, PATCH) * PATCH - width
    below = tl.cdiv(height, PATCH) * PATCH - height
    num_right = (height + below) * right
    row = tl.where(x >= width, y * right + x - width, num_right + (y - height) * width + x)
    return tl.cast(image, tl.int64) * (num_right + below * width) + row


@triton.jit
def pixel_rows(ptr, window_pixel, offset, channels):
    """Pointers [TILE] to the first channel of each token's pixel."""
    return ptr + window_pixel * channels + offset * channels


@triton.jit
def head_channels(head, first_dim, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Channels [1, BLOCK_D] of a head from ``first_dim`` on, and which of them are the head's."""
    dim = first_dim + tl.arange(0, BLOCK_D)
    return (head * HEAD_DIM + dim)[None, :], (dim < HEAD_DIM)[None, :]


@triton.jit
def load_keys(rows, bias_ptr, channel, in_head, inside, is_token):
    """Keys or values [TILE, BLOCK_D] of the tokens; those of padded pixels are the bias."""
    mask = inside[:, None] & in_head
    keys = tl.load(rows[:, None] + channel, mask=mask, other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=in_head, other=0.0).to(keys.dtype)
        keys = tl.where((is_token & ~inside)[:, None], bias, keys)
    return keys


@triton.jit
def lse_pointers(
    lse_ptr,
    tile,
    head,
    num_heads,
    PATCH: tl.constexpr,
    WINDOWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Pointers [TILE] to the tokens' log-sum-exp in (windows, heads, N*N)."""
    PIXELS: tl.constexpr = PATCH * PATCH
    token = tl.arange(0, TILE)
    first_row = tl.cast(tile, tl.int64) * (WINDOWS * num_heads) + head
    row = token // PIXELS * num_heads
    return lse_ptr + first_row * PIXELS + (row * PIXELS + token % PIXELS)


@triton.jit
def apart(tile, bias, value, WINDOWS: tl.constexpr):
    """``tile`` [TILE, TILE] with ``value`` between different windows, where ``bias`` is -inf.

    Adding -inf masks no NaN. A tile of one window needs none of it: its other tokens are zeros.
    """
    if WINDOWS > 1:
        tile = tl.where(bias != -float("inf"), tile, value)
    return tile


@triton.jit
def dot_apart(weights, x, windows, PATCH: tl.constexpr, WINDOWS: tl.constexpr, PRECISION):
    """``weights @ x`` [TILE, BLOCK_D] of weights that are zero between the tile's ``windows``.

    Zero times NaN or infinity is NaN, so where there is any NaN each window is multiplied alone.
    """
    product = dot(weights, x, PRECISION)
    if WINDOWS > 1:
        # [TILE, 1]
        window = (tl.arange(0, x.shape[0]) // (PATCH * PATCH))[:, None]
        if tl.max((product != product).to(tl.int32)) > 0:
            for one in tl.range(0, windows, num_stages=1):
                alone = dot(weights, tl.where(window == one, x, 0.0), PRECISION)
                product = tl.where(window == one, alone, product)
    return product


@triton.jit
def bias_tile(
    table_ptr,
    head,
    num_heads,
    PATCH: tl.constexpr,
    WINDOWS: tl.constexpr,
    TILE: tl.constexpr,
    SCORE_UNIT: tl.constexpr,
):
    """Relative position bias [TILE, TILE] times SCORE_UNIT; -inf between different windows.

    Rows that hold no token stand for window 0, which keeps their softmax finite: nothing is read
    from them, but NaN would spread through the products.
    """
    PIXELS: tl.constexpr = PATCH * PATCH
    token = tl.arange(0, TILE)
    window = token // PIXELS
    row_window = tl.where(window < WINDOWS, window, 0)
    # [TILE, TILE]
    together = row_window[:, None] == window[None, :]
    bias = tl.zeros([TILE, TILE], tl.float32)
    if table_ptr is not None:
        y = token % PIXELS // PATCH
        x = token % PIXELS % PATCH
        dy = y[:, None] - y[None, :] + PATCH - 1
        dx = x[:, None] - x[None, :] + PATCH - 1
        entry = (dy * (2 * PATCH - 1) + dx) * num_heads + head
        bias = tl.load(table_ptr + entry, mask=together, other=0.0).to(tl.float32) * SCORE_UNIT
    return tl.where(together, bias, -float("inf"))


@triton.jit
def keep_tile(
    seed,
    threshold,
    head,
    tile,
    PATCH: tl.constexpr,
    WINDOWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Which attention weights [TILE, TILE] dropout keeps, by their place in their window."""
    PIXELS: tl.constexpr = PATCH * PATCH
    token = tl.arange(0, TILE)
    pixel = token % PIXELS
    window = tile * WINDOWS + token // PIXELS
    heads = head + tl.zeros([TILE], tl.int32)
    # [TILE, 1]
    word = keep_word(seed, threshold, 0, pixel, heads, window)[:, None]
    if PIXELS > 32:
        upper = keep_word(seed, threshold, 32, pixel, heads, window)[:, None]
        # [TILE, TILE]
        word = tl.where((pixel < 32)[None, :], word, upper)
    return ((word >> (pixel % 32)[None, :]) & 1) != 0
