"""What a training run leaves in its folder: the weights, a checkpoint, the metrics and a curve."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from catkernels.training.trainer import Epoch

# Between two checkpoints within an epoch: what a killed run loses at most.
CHECKPOINT_SECONDS = 60


class RunFolder:
    """The folder of one run. Each file in it is whole at any moment, whenever the run is killed.

    Args:
        path: the folder.
        options: what the run is of; `resume` asks that it be the same.
        processes: how many train; `resume` asks that as well, since each draws its own DropPath.

    Attributes:
        weights: path of the model's state_dict, written when the training is done.
        checkpoint: path of what is needed to resume.
        metrics: path of a table, one row an epoch.
        curve: path of a picture of it.
    """

    def __init__(self, path: Path, options: dict[str, Any], processes: int) -> None:
        self.path = path
        self.options = options
        self.resumed_only_with = options | {"processes": processes}
        self.weights = path / "model.safetensors"
        self.checkpoint = path / "checkpoint.pt"
        self.metrics = path / "metrics.csv"
        self.curve = path / "curve.png"
        self.saved_at = time.monotonic()

    def resume(self, wanted: bool) -> dict[str, Any] | None:
        """The state that the run got to, or None for a run that has to start.

        Args:
            wanted: whether to go on with a run, or to start one.

        Raises:
            ValueError: there is no run to go on with; or one that is not wanted, of other options,
                or unreadable.
        """
        if not self.checkpoint.exists():
            if wanted:
                raise ValueError(
                    f"there is no run in {self.path} to resume: start one without --resume, or "
                    "name its folder by --output"
                )
            return None
        if not wanted:
            raise ValueError(
                f"{self.path} holds a run already: go on with it by --resume, or give another "
                "--output"
            )
        try:
            content = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            options, state = content["options"], content["state"]
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as e:
            raise ValueError(
                f"{self.checkpoint} is no checkpoint of a run: remove it to start again"
            ) from e
        changed = [
            f"{name} was {options.get(name)!r} and is now {value!r}"
            for name, value in self.resumed_only_with.items()
            if options.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"--resume goes on with the run in {self.path}, but {', '.join(changed)}: "
                "start it as it was started"
            )
        return state

    def is_due(self) -> bool:
        """Whether the last checkpoint is old enough for another one."""
        return time.monotonic() - self.saved_at > CHECKPOINT_SECONDS

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        content = {"options": self.resumed_only_with, "state": state}
        write_atomically(self.checkpoint, lambda file: torch.save(content, file))
        self.saved_at = time.monotonic()

    def save_weights(self, state_dict: dict[str, Tensor]) -> None:
        """Save the weights, with the options and what computed them in the file's header."""
        # one entry, since safetensors writes several in no fixed order
        about = {"catkernels": json.dumps({"options": self.options, "made_with": made_with()})}
        tensors = {name: tensor.contiguous() for name, tensor in state_dict.items()}
        data = safetensors.torch.save(tensors, about)
        write_atomically(self.weights, lambda file: file.write(data))

    def save_metrics(self, epochs: Sequence[Epoch]) -> None:
        text = io.StringIO()
        table = csv.DictWriter(text, [field.name for field in fields(Epoch)], lineterminator="\n")
        table.writeheader()
        table.writerows(asdict(epoch) for epoch in epochs)
        write_atomically(self.metrics, lambda file: file.write(text.getvalue().encode()))

    def save_curve(self, epochs: Sequence[Epoch], losses: Tensor, title: str) -> None:
        """Draw the metrics, over the loss of each step (steps,)."""
        figure = draw_curve(epochs, losses, title)
        write_atomically(self.curve, lambda file: figure.savefig(file, format="png", dpi=120))


def made_with() -> dict[str, str]:
    """What a run's rounding depends on here, beside its options."""
    return {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}


def draw_curve(epochs: Sequence[Epoch], losses: Tensor, title: str) -> Figure:
    """Both losses and the accuracy by epoch, over the loss of each step (steps,)."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    places = [epoch.epoch for epoch in epochs]
    in_epochs = (torch.arange(len(losses)) + 1) * len(epochs) / len(losses)
    loss_axes.plot(in_epochs.numpy(), losses.cpu().numpy(), color="C0", alpha=0.25, linewidth=0.8)
    loss_axes.plot(places, [e.train_loss for e in epochs], color="C0", label="training")
    loss_axes.plot(places, [e.test_loss for e in epochs], color="C1", label="test")
    loss_axes.set(xlabel="epoch", ylabel="cross-entropy", ylim=(0, None))
    loss_axes.legend(frameon=False)
    accuracy_axes.plot(places, [100 * epoch.test_accuracy for epoch in epochs], color="C1")
    accuracy_axes.set(xlabel="epoch", ylabel="test accuracy (%)", ylim=(0, 101))
    accuracy_axes.set_title(f"{100 * epochs[-1].test_accuracy:.1f} % after epoch {places[-1]}")
    for axes in (loss_axes, accuracy_axes):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that at any moment it is the old one or the new one, and whole."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
