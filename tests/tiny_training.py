"""A training run that takes a second: its model, its data and its photos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import TensorDataset

import catkernels
from catkernels.training.data import Augmentation, ImageData
from catkernels.training.recipe import Recipe
from catkernels.training.trainer import Trainer

RECIPE = Recipe(epochs=3, batch_size=8, learning_rate=0.5)
# Options of the command for photos as `write_photos` makes them.
SMALL = ("--model", "digits", "--size", "8", "--batch-size", "8", "--workers", "0")


def tiny_model(kind: type[catkernels.CAT] = catkernels.CAT, **options) -> catkernels.CAT:
    """A CAT of two stages for images (B, 1, 8, 8) of three classes, always of the same weights."""
    torch.manual_seed(1)
    sizes = {"img_size": 8, "patch_emb_size": 1, "in_chans": 1, "num_classes": 3, "patch_size": 4}
    stages = {"embed_dim": 4, "depths": (1, 1), "num_heads": (1, 2), "ape": True}
    return kind(**(sizes | stages | options))


def tiny_data(train: int = 36, test: int = 9) -> ImageData:
    """Three classes that differ in which third of the image is bright."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(train + test) % 3
    images = torch.randn(train + test, 1, 8, 8, generator=generator)
    for image, label in zip(images, labels, strict=True):
        image[0, 3 * label : 3 * label + 2] += 3
    parts = (slice(train), slice(train, None))
    datasets = (TensorDataset(images[part], labels[part]) for part in parts)
    return ImageData(*datasets, ("top", "middle", "bottom"), Augmentation(10, 0.1, 0.1, True))


def trained(trainer: Trainer, until_step: int | None = None) -> dict[str, torch.Tensor]:
    """The weights after so many steps, by default all."""
    for _ in trainer.run():
        if trainer.step == until_step:
            break
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def write_corrupt_dds(path: Path) -> Path:
    """An image of a pixel format that Pillow meets with a NotImplementedError."""
    Image.new("RGB", (4, 4)).save(path)
    content = bytearray(path.read_bytes())
    content[80:88] = b"\x04\0\0\0XXXX"
    path.write_bytes(content)
    return path


def write_photos(folder: Path, count: int = 10, classes: tuple[str, ...] = ("dark", "light")):
    """Images of noise, lighter from class to class, in a folder for each class."""
    generator = np.random.default_rng(0)
    for index, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for image in range(count):
            pixels = generator.integers(0, 80, (12, 16, 3)) + 150 * index
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{image}.png")
    return folder
