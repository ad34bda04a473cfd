"""``python -m catkernels train``: from what the user asked for to the files of the run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from catkernels.arguments import Backend
from catkernels.cat import CAT
from catkernels.commands.models import MODELS, Checkpoint, default_size, read_checkpoint
from catkernels.training.data import ImageData, digits_data, folder_data
from catkernels.training.processes import joined_processes
from catkernels.training.recipe import Recipe
from catkernels.training.run_folder import RunFolder
from catkernels.training.trainer import Trainer

try:
    from tqdm import tqdm
except ImportError as error:
    raise ImportError("training needs tqdm: pip install 'catkernels[train]'") from error

# A small model on few images takes small batches and large steps.
DIGITS_RECIPE = Recipe(epochs=40, batch_size=64, learning_rate=3.2e-2)
FOLDER_RECIPE = Recipe(epochs=100, batch_size=64)


def run(
    *,
    data: str,
    model: str | None,
    size: int | None,
    drop_path: float | None,
    backend: Backend,
    workers: int | None,
    output: Path,
    checkpoint: Path | None,
    resume: bool,
    strict: bool,
    **recipe_changes: Any,
) -> None:
    """Train a classifier, and leave its weights, metrics and curve in ``output``.

    Args:
        data: "digits", or the path of a folder of images; see `folder_data`.
        model: a name of `MODELS`; None: what the checkpoint says, else "digits" for the digits and
            "cat_tiny" for a folder.
        size: side of the images; None: what the checkpoint says, else what the model is made for.
        drop_path: stochastic depth of the last block; None: the model's own.
        backend: "auto", "triton" or "reference"; see `catkernels.functional`.
        workers: processes that read images, beside each one that trains; None: 0 for the digits,
            which are in memory, else up to 8.
        output: the folder for all that the run writes.
        checkpoint: weights to start from; of other classes all but the head.
        resume: go on with the run in ``output``.
        strict: raise where an image cannot be read, instead of leaving it out.
        recipe_changes: values of `Recipe` other than the default; None: the default.

    Raises:
        OSError: ``output`` cannot be written, or there is no such checkpoint.
        ValueError: the options contradict each other, the data, the checkpoint or the run in
            ``output``.
    """
    is_digits = data == "digits"
    recipe = replace(
        DIGITS_RECIPE if is_digits else FOLDER_RECIPE,
        **{name: value for name, value in recipe_changes.items() if value is not None},
    )
    if workers is None:
        workers = 0 if is_digits else min(8, os.cpu_count() or 1)

    with (
        joined_processes() as processes,
        # the digits' maps are too small to be worth dividing, and one thread gives the same bits
        # on machines of any number of cores
        _threads(1 if is_digits else torch.get_num_threads()),
    ):
        # in the first for all, since the others may be on machines that do not have the files
        start = checkpoint and processes.from_first(lambda: read_checkpoint(checkpoint, model))
        model = model or (start.model if start else "digits" if is_digits else "cat_tiny")
        size = size or (start.size if start else default_size(model))
        images = (
            digits_data(size) if is_digits else folder_data(Path(data), size, processes, strict)
        )
        options = MODELS[model] | {"img_size": size, "num_classes": len(images.classes)}
        options["in_chans"] = images.train[0][0].shape[0]
        if drop_path is not None:
            options["drop_path_rate"] = drop_path
        torch.manual_seed(recipe.seed)
        network = CAT(**(options | {"backend": backend}))
        described = {
            "data": data,
            "classes": list(images.classes),
            "images": [len(images.train), len(images.test)],
            "model": model,
            "size": size,
            "drop_path": options["drop_path_rate"],
            **asdict(recipe),
        }
        if start:
            described["checkpoint"] = str(checkpoint)
        folder = RunFolder(output, described, processes.count)
        state = processes.from_first(lambda: folder.resume(resume))
        origin = None
        if start and state is None:
            # into the first alone, whose weights the others then take
            origin = processes.from_first(lambda: _load(network, start, images))
        # no name for the trainer, which must be gone when the processes part
        _train(Trainer(network, images, recipe, processes, workers), folder, state, origin)


def _load(network: CAT, start: Checkpoint, images: ImageData) -> str:
    """Load what the training starts from, and say what that was."""
    channels = network.patch_embed.in_chans
    if start.in_chans != channels:
        raise ValueError(
            f"{start.path.name} is of images with {start.in_chans} channels, these have {channels}"
        )
    names = start.classes
    same = len(images.classes) == start.num_classes if names is None else names == images.classes
    report = start.load_into(network, new_head=not same)
    fresh = [*report.new, *report.missing]
    also = f"; {', '.join(fresh)} start anew, for {len(images.classes)} classes" if fresh else ""
    return f"starts from {start.path}: {len(report.loaded)} tensors{also}"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute in so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(
    trainer: Trainer, folder: RunFolder, state: dict[str, Any] | None, origin: str | None
) -> None:
    """Train to the end, from ``state`` on, showing how far it has come and saving it."""
    if state is not None:
        trainer.load_state_dict(state)
    first = trainer.processes.is_first
    if first:
        folder.path.mkdir(parents=True, exist_ok=True)
        _describe(trainer, folder, origin)
    bar = tqdm(
        desc="training",
        total=trainer.steps,
        initial=trainer.step,
        unit="step",
        # None: only where the output is a terminal
        disable=None if first else True,
        leave=False,
    )
    with bar:
        for epoch in trainer.run():
            bar.update()
            if not first:
                continue
            if epoch is not None:
                bar.write(
                    f"epoch {epoch.epoch:3}/{trainer.recipe.epochs}  "
                    f"training loss {epoch.train_loss:.3f}  test loss {epoch.test_loss:.3f}  "
                    f"test accuracy {100 * epoch.test_accuracy:5.1f} %  {epoch.seconds:.1f} s"
                )
                folder.save_metrics(trainer.epochs)
            if epoch is not None or folder.is_due():
                folder.save_checkpoint(trainer.state_dict())
    if first:
        _finish(trainer, folder)


def _describe(trainer: Trainer, folder: RunFolder, origin: str | None) -> None:
    data = trainer.data
    for why in data.unreadable:
        print(f"left out: {why}")
    if left_out := len(data.unreadable):
        images = left_out + len(data.train) + len(data.test)
        print(f"{left_out} of {images} images cannot be read and are left out")
    processes = trainer.processes
    parameters = sum(p.numel() for p in trainer.model.parameters())
    among = "" if processes.count == 1 else f" and {processes.count - 1} more"
    print(
        f"{folder.options['model']}, {parameters / 1e6:.2f} M parameters, "
        f"{trainer.recipe.precision} on {processes.device}{among}: {len(data.train)} images of "
        f"{len(data.classes)} classes, {len(data.test)} held out"
    )
    if origin:
        print(origin)
    if trainer.step:
        print(f"resumed after step {trainer.step} of {trainer.steps}")


def _finish(trainer: Trainer, folder: RunFolder) -> None:
    data, last = trainer.data, trainer.epochs[-1]
    title = (
        f"{folder.options['model']}, {trainer.recipe.precision}: "
        f"{len(data.train)} images of {len(data.classes)} classes"
    )
    folder.save_metrics(trainer.epochs)
    folder.save_curve(trainer.epochs, trainer.losses, title)
    folder.save_weights(trainer.model.state_dict())
    for path in (folder.weights, folder.metrics, folder.curve):
        print(f"written: {path}")
    print(f"test accuracy {100 * last.test_accuracy:.1f} %")
