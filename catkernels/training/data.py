"""What a CAT learns from: scikit-learn's digits, or a folder of photographs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.model_selection import StratifiedKFold
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from tqdm.contrib.concurrent import thread_map

from catkernels.checkpoint import some
from catkernels.digits import IMAGE_SIZE, load_digits
from catkernels.images import image_files, normalised, read_photo
from catkernels.training.processes import Processes

# Of each class one image in so many is held out where the folder holds none.
HOLD_OUT = 5


@dataclass(frozen=True)
class Augmentation:
    """What an image may undergo and still be of its class.

    Attributes:
        degrees: rotation by up to so much, either way.
        zoom: scaling by up to this share of its size, up and down.
        shift: moving by up to this share of its sides, either way.
        flip: whether left and right may be exchanged.
    """

    degrees: float = 0.0
    zoom: float = 0.0
    shift: float = 0.0
    flip: bool = False

    def draw(self, images: int, generator: torch.Generator) -> Tensor:
        """A random affine map (2, 3) for each of so many images: (images, 2, 3)."""
        angle, scale, x, y, mirror = 2 * torch.rand(5, images, generator=generator) - 1
        angle = torch.deg2rad(self.degrees * angle)
        scale = 1 + self.zoom * scale
        sign = torch.where(mirror < 0, -1.0, 1.0) if self.flip else torch.ones(images)
        # in the coordinates of `affine_grid` an image reaches from -1 to 1, so is 2 wide
        rows = [
            [sign * scale * angle.cos(), -scale * angle.sin(), 2 * self.shift * x],
            [sign * scale * angle.sin(), scale * angle.cos(), 2 * self.shift * y],
        ]
        return torch.stack([torch.stack(row, -1) for row in rows], 1)


def warp(images: Tensor, maps: Tensor) -> Tensor:
    """Images (B, C, H, W), each sampled where its affine map (B, 2, 3) points."""
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class ImageData:
    """Images to learn from and images to be tested with.

    Attributes:
        train, test: images (C, size, size) in float32, each with the index of its class.
        classes: the name of each class.
        augmentation: what a training image may undergo.
        unreadable: why images of the folder were left out, one line each.
    """

    train: TensorDataset | PhotoDataset
    test: TensorDataset | PhotoDataset
    classes: tuple[str, ...]
    augmentation: Augmentation
    unreadable: tuple[str, ...] = ()


class PhotoDataset(Dataset[tuple[Tensor, int]]):
    """Photos in files, read when they are asked for."""

    def __init__(self, files: Sequence[tuple[Path, int]], size: int) -> None:
        self.files = list(files)
        self.size = size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        return normalised(read_photo(path, self.size)), label


def digits_data(size: int = IMAGE_SIZE) -> ImageData:
    """The digits of scikit-learn at ``size`` x ``size`` pixels, a fifth of each class held out."""
    images, labels = load_digits(size)
    train, test = (TensorDataset(images[part], labels[part]) for part in held_out(labels.tolist()))
    # a mirrored digit is no digit
    augmentation = Augmentation(degrees=10, zoom=0.1, shift=0.1)
    return ImageData(train, test, tuple("0123456789"), augmentation)


def folder_data(folder: Path, size: int, processes: Processes, strict: bool) -> ImageData:
    """Photos in a folder that has a folder for each class.

    The class folders may also be in ``train`` and ``test`` (or ``val``) within it. Where there are
    no test images, a fifth of each class is held out.

    Args:
        folder: what is no image by its name is passed over.
        size: side of the square that each photo becomes.
        processes: the first one reads every image once to know that it can be read.
        strict: raise where an image cannot be read, instead of leaving it out.

    Raises:
        ValueError: there is no such folder, it holds too few classes or images, or with ``strict``
            an image that cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(
            f"--data must be 'digits' or a folder of images, there is no folder {folder}"
        )
    train_folder = folder / "train" if (folder / "train").is_dir() else folder
    classes, train = _files_by_class(train_folder)
    test: list[tuple[Path, int]] = []
    for test_folder in (folder / "test", folder / "val"):
        if train_folder != folder and test_folder.is_dir() and not test:
            test_classes, test = _files_by_class(test_folder)
            if test_classes != classes:
                raise ValueError(
                    f"{train_folder} has the classes {some(classes)} and {test_folder} "
                    f"{some(test_classes)}: give both the same folders"
                )

    faults = processes.from_first(lambda: _faults([path for path, _ in train + test]))
    if strict and faults:
        raise ValueError(f"{some(faults.values())}: mend or remove it, or leave out --strict")
    train, test = ([file for file in files if file[0] not in faults] for files in (train, test))
    _check_class_sizes(train, classes, train_folder, needed=1 if test else HOLD_OUT)
    if not test:
        parts = held_out([label for _, label in train])
        train, test = ([train[index] for index in part] for part in parts)
    return ImageData(
        train=PhotoDataset(train, size),
        test=PhotoDataset(test, size),
        classes=classes,
        augmentation=Augmentation(zoom=0.2, shift=0.1, flip=True),
        unreadable=tuple(faults.values()),
    )


def held_out(labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Indices to train with and indices held out: a fifth of each class, always the same ones."""
    folds = StratifiedKFold(HOLD_OUT, shuffle=True, random_state=0)
    train, test = next(folds.split(labels, labels))
    return train.tolist(), test.tolist()


def _files_by_class(folder: Path) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    """The classes that a folder has folders for, and the image files with their class's index."""
    folders = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(folders) < 2:
        raise ValueError(
            f"{folder} needs a folder of images for each of at least two classes, it has "
            f"{len(folders)}: {folder.name}/cat/1.jpg, {folder.name}/dog/1.jpg, ..."
        )
    files = [
        (path, label)
        for label, class_folder in enumerate(folders)
        for path in image_files(class_folder)
    ]
    return tuple(p.name for p in folders), files


def _faults(paths: Sequence[Path]) -> dict[Path, str]:
    """Why images cannot be read, of those that cannot."""

    def fault(path: Path) -> str | None:
        try:
            read_photo(path, size=1)
        except ValueError as error:
            return str(error)
        return None

    # decoding leaves Python's lock, so threads do
    faults = thread_map(fault, paths, desc="checking images", leave=False, disable=None)
    return {path: why for path, why in zip(paths, faults, strict=True) if why}


def _check_class_sizes(
    files: Sequence[tuple[Path, int]], classes: Sequence[str], folder: Path, needed: int
) -> None:
    sizes = Counter(label for _, label in files)
    for label, name in enumerate(classes):
        if sizes[label] < needed:
            raise ValueError(
                f"{folder / name} needs at least {needed} readable images, it has {sizes[label]}"
            )
