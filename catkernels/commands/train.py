"""``python -m catkernels train``: from what the user asked for to the files of the run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from catkernels.cat import CAT, VARIANTS
from catkernels.digits import DIGITS
from catkernels.functional import Backend
from catkernels.training.data import digits_data, folder_data
from catkernels.training.processes import joined_processes
from catkernels.training.recipe import Recipe
from catkernels.training.run_folder import RunFolder
from catkernels.training.trainer import Trainer

# A small model on few images takes small batches and large steps.
DIGITS_RECIPE = Recipe(epochs=40, batch_size=64, learning_rate=3.2e-2)
FOLDER_RECIPE = Recipe(epochs=100, batch_size=64)
MODELS = {"digits": DIGITS} | VARIANTS


def run(
    *,
    data: str,
    model: str | None,
    size: int | None,
    drop_path: float | None,
    backend: Backend,
    workers: int | None,
    output: Path,
    resume: bool,
    strict: bool,
    **recipe_changes,
) -> None:
    """Train a classifier, and leave its weights, metrics and curve in ``output``.

    Args:
        data: "digits", or the path of a folder of images; see `folder_data`.
        model: a name of `MODELS`; None: "digits" for the digits, "cat_tiny" for a folder.
        size: side of the images; None: what the model is made for.
        drop_path: stochastic depth of the last block; None: the model's own.
        backend: "auto", "triton" or "reference"; see `catkernels.functional`.
        workers: processes that read images, beside each one that trains; None: 0 for the digits,
            which are in memory, else up to 8.
        output: the folder for all that the run writes.
        resume: go on with the run in ``output`` where there is one.
        strict: raise where an image cannot be read, instead of leaving it out.
        recipe_changes: values of `Recipe` other than the default; None: the default.

    Raises:
        OSError: ``output`` cannot be written.
        ValueError: the options contradict each other, the data or the run in ``output``.
    """
    is_digits = data == "digits"
    model = model or ("digits" if is_digits else "cat_tiny")
    size = size or MODELS[model].get("img_size", 224)
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
        images = (
            digits_data(size) if is_digits else folder_data(Path(data), size, processes, strict)
        )
        options = MODELS[model] | {"img_size": size, "num_classes": len(images.classes)}
        options["in_chans"] = images.train[0][0].shape[0]
        if drop_path is not None:
            options["drop_path_rate"] = drop_path
        torch.manual_seed(recipe.seed)
        network = CAT(**options, backend=backend)
        described = {
            "data": data,
            "classes": list(images.classes),
            "images": [len(images.train), len(images.test)],
            "model": model,
            "size": size,
            "drop_path": options["drop_path_rate"],
            **asdict(recipe),
        }
        folder = RunFolder(output, described, processes.count)
        # for all, since the others may be on machines that do not have the folder
        state = processes.from_first(lambda: folder.resume(resume))
        # no name for the trainer, which must be gone when the processes part
        _train(Trainer(network, images, recipe, processes, workers), folder, state)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute in so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(trainer: Trainer, folder: RunFolder, state: dict | None) -> None:
    """Train to the end, from ``state`` on, showing how far it has come and saving it."""
    if state is not None:
        trainer.load_state_dict(state)
    first = trainer.processes.is_first
    if first:
        folder.path.mkdir(parents=True, exist_ok=True)
        _describe(trainer, folder)
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


def _describe(trainer: Trainer, folder: RunFolder) -> None:
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
