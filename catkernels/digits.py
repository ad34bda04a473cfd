"""A CAT for handwritten digits, small enough to ship with its weights.

The images are the 1797 real digits that scikit-learn ships, 8 x 8 pixels each. Doubled in size, a
digit is a 16 x 16 map of 4 x 4 patches: both attentions have something to do, and N divides it.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from catkernels.cat import CAT, CATOptions
from catkernels.checkpoint import load_checkpoint

# The side of a digit's map, in pixels.
IMAGE_SIZE = 16
# The model, as arguments of `CAT`.
DIGITS: CATOptions = {
    "img_size": IMAGE_SIZE,
    "patch_emb_size": 1,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 16,
    "depths": (1, 1),
    "num_heads": (1, 2),
    "patch_size": 4,
    "drop_path_rate": 0.05,
    "ape": True,
}
WEIGHTS = Path(__file__).with_name("digits.safetensors")


def pretrained_digits() -> CAT:
    """The model with the weights that ship, in evaluation mode: (B, 1, 16, 16) -> (B, 10)."""
    model = CAT(**DIGITS)
    load_checkpoint(model, WEIGHTS)
    return model.eval()


def load_digits(size: int = IMAGE_SIZE) -> tuple[Tensor, Tensor]:
    """The images (1797, 1, size, size), -1 (paper) to 1 (ink), and the digits (1797,) they show.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        import sklearn.datasets
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error
    digits = sklearn.datasets.load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1  # 17 levels, 0 .. 16
    images = F.interpolate(images, (size, size), mode="bilinear")
    return images, torch.from_numpy(digits.target).long()
