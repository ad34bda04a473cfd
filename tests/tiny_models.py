"""The sizes of the small models that tests build."""

from __future__ import annotations

# two stages, whose heads of 4 and 8 dimensions no kernel takes
TINY = {
    "img_size": 56,
    "embed_dim": 12,
    "depths": (1, 1),
    "num_heads": (3, 3),
    "num_classes": 4,
    "ape": True,
}
# two stages with heads of 16 dimensions, the fewest that kernels take
SERVED = TINY | {"embed_dim": 16, "num_heads": (1, 2)}
# a backbone of one stage that kernels serve, in windows of 2 x 2
ONE_STAGE = {
    "img_size": 16,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": (1,),
    "num_heads": (1,),
    "out_indices": (0,),
}
