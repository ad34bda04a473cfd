"""Classify photographs with the weights that a training run wrote, or with official ones."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from catkernels.cat import CAT
from catkernels.commands.models import read_checkpoint
from catkernels.images import image_files, ink, normalised, read_photo
from catkernels.torch_state.device import best_device

try:
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f"predict needs {error.name}: pip install 'catkernels[train]'") from error

BATCH_SIZE = 16


def run(*, checkpoint: Path, images: Sequence[Path], size: int | None, top: int) -> None:
    """Print for each image its most probable classes, and how probable they are.

    Args:
        checkpoint: the weights of a classifier.
        images: files, or folders of them.
        size: side of the square that each photo becomes; None: what the model was trained with.
        top: how many classes to print.

    Raises:
        FileNotFoundError: there is no such checkpoint, file or folder.
        ValueError: the checkpoint is of no classifier that is known here, a folder holds no images,
            or images could not be read (after all others are classified).
    """
    trained = read_checkpoint(checkpoint)
    if not trained.num_classes:
        raise ValueError(f"{checkpoint.name} is of a backbone: it holds no head to classify with")
    paths = _find(images)
    network = CAT(**trained.options)
    report = trained.load_into(network)
    if report.missing:
        raise ValueError(f"{checkpoint.name} is incomplete: it lacks {', '.join(report.missing)}")
    network = network.to(best_device()).eval()
    names = trained.classes or [f"class {index}" for index in range(trained.num_classes)]
    prepare = ink if trained.in_chans == 1 else normalised

    def read(path: Path) -> Tensor | ValueError:
        try:
            return prepare(read_photo(path, size or trained.size))
        except ValueError as error:
            return error

    unreadable = 0
    # disable=None: only where the output is a terminal
    hidden = None if len(paths) > BATCH_SIZE else True
    with tqdm(total=len(paths), unit="image", disable=hidden, leave=False) as bar:
        for path, result in _classify(network, paths, read):
            if isinstance(result, Tensor):
                bar.write(f"{path}: {_in_words(result, names, top)}", file=sys.stdout)
            elif len(paths) == 1:
                raise result
            else:
                bar.write(str(result), file=sys.stderr)
                unreadable += 1
            bar.update()
    if unreadable:
        raise ValueError(f"{unreadable} of {len(paths)} images cannot be read")


def _find(images: Sequence[Path]) -> list[Path]:
    """The files named, and those in the folders named."""
    paths = []
    for path in images:
        if not path.exists():
            raise FileNotFoundError(f"there is no image or folder {path}")
        found = image_files(path) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"there are no images in the folder {path}")
        paths += found
    return paths


def _classify(
    network: CAT, paths: Sequence[Path], read: Callable[[Path], Tensor | ValueError]
) -> Iterator[tuple[Path, Tensor | ValueError]]:
    """Each path with the probabilities (num_classes,), or with why it could not be read."""
    device = next(network.parameters()).device
    # decoding leaves Python's lock, so threads do
    with ThreadPoolExecutor() as threads:
        for start in range(0, len(paths), BATCH_SIZE):
            batch = paths[start : start + BATCH_SIZE]
            results = list(threads.map(read, batch))
            photos = [result for result in results if isinstance(result, Tensor)]
            probabilities = iter(())
            if photos:
                with torch.inference_mode():
                    logits = network(torch.stack(photos).to(device))
                probabilities = iter(logits.softmax(-1).cpu())
            for path, result in zip(batch, results, strict=True):
                yield path, next(probabilities) if isinstance(result, Tensor) else result


def _in_words(probabilities: Tensor, names: Sequence[str], top: int) -> str:
    """The most probable classes first: ``cat (93.1 %), dog (6.2 %)``."""
    best = probabilities.topk(min(top, len(names)))
    return ", ".join(
        f"{names[index]} ({100 * probability:.1f} %)"
        for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    )
