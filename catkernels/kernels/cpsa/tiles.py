"""What the CPSA kernels share: the grid that patches are laid on, and dropout.

A patch of N x N pixels is one token. It is laid on a grid of 8 x 8 pixels, so that a token has 64
coordinates for every N up to 8; those beside the patch are zero, but for `map_tiles.with_ones`.

The weights come folded (`catkernels.reference.fold_weights`): keys and values are the tokens
themselves: ``query = x A + u``, ``out = softmax(query x^T) x M + c``. See `weights` for how A
and M are scaled.
"""

import triton
import triton.language as tl

from catkernels.kernels.tiles import keep_word

GRID = tl.constexpr(8)  # pixels on a side of the grid that a patch is laid on
PIXELS = tl.constexpr(64)

# Arguments that bring no alignment: a kernel compiled for one batch serves every other.
COUNTS = [
    "height",
    "width",
    "num_patches",
    "num_channels",
    "num_sequences",
    "num_tiles",
    "drop_threshold",
    "statistics_stride",
]


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
