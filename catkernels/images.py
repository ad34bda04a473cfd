"""Photographs as CAT takes them: a square, with the colours that ImageNet models are trained on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

try:
    import numpy as np
    import PIL.Image
    import PIL.ImageOps
except ImportError as error:
    raise ImportError(f"reading images needs {error.name}: pip install pillow") from error

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def image_files(folder: Path) -> list[Path]:
    """The files in a folder, however deep, whose names are those of images, in order."""
    extensions = PIL.Image.registered_extensions()
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in extensions)


def read_photo(path: Path, size: int) -> PIL.Image.Image:
    """The photo in a file, upright and in colour: its middle square, ``size`` x ``size`` pixels.

    Raises:
        ValueError: the file cannot be read as an image.
    """
    try:
        with PIL.Image.open(path) as opened:
            photo = _in_8_bits(PIL.ImageOps.exif_transpose(opened)).convert("RGB")
    # of a corrupt file Pillow's plugins raise anything, AttributeError and RuntimeError included
    except Exception as error:
        # what they looked up in vain, and the system's number of an error, say nothing to anybody
        damaged = "it is damaged" if isinstance(error, LookupError) else ""
        why = damaged or getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"cannot read the image {path}: {why}") from error
    return middle_square(photo, size)


def middle_square(photo: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """The middle square of a photo, scaled to ``size`` x ``size`` pixels."""
    side = min(photo.size)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    return photo.resize((size, size), box=(left, top, left + side, top + side))


def normalised(photo: PIL.Image.Image) -> Tensor:
    """(3, H, W), with the mean and deviation that ImageNet models are trained with."""
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std


def ink(photo: PIL.Image.Image) -> Tensor:
    """(1, H, W), -1 (white paper) to 1 (black ink), as `catkernels.digits` has its digits."""
    return 1 - torch.from_numpy(np.array(photo.convert("L"))).float()[None] / 127.5


def _in_8_bits(photo: PIL.Image.Image) -> PIL.Image.Image:
    """Deeper pixels, which Pillow would clip, scaled from their range to 0 .. 255."""
    if not photo.mode.startswith(("I", "F")):
        return photo
    pixels = np.asarray(photo, dtype=np.float64)
    low, high = pixels.min(), pixels.max()
    return PIL.Image.fromarray(np.uint8(255 * (pixels - low) / max(high - low, 1e-9)))
