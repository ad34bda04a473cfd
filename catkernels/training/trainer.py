"""The training loop: one process or several, and exactly resumable after any step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from catkernels.cat import CAT
from catkernels.training.data import ImageData, warp
from catkernels.training.processes import Processes
from catkernels.training.recipe import PRECISIONS, Recipe, make_optimizer, make_schedule


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to.

    Attributes:
        epoch: its number, from 1.
        learning_rate: that of its last step.
        train_loss: the mean of its steps, with augmentation and label smoothing.
        test_loss, test_accuracy: after its last step, on the held-out images; a share of 1.
        seconds: what it took, the test included (of an epoch that was resumed: from there on).
    """

    epoch: int
    learning_rate: float
    train_loss: float
    test_loss: float
    test_accuracy: float
    seconds: float


class Trainer:
    """Trains a classifier with a recipe.

    All that is random in a step follows from the seed and the step's number, and the order of the
    images from the seed and the epoch's. So the state after a step is all that is needed to go on
    as if nothing had happened, and the augmentation is the same however many processes share a
    batch. Only DropPath and dropout are drawn by each process for itself. Every step sets torch's
    seed.

    Args:
        model: a CAT classifier; it is moved to the processes' device.
        data: what to learn from.
        recipe: how.
        processes: among which each batch is divided.
        workers: processes beside each of these that read images; 0: it reads them itself.

    Raises:
        ValueError: the batch cannot be divided among the processes, or there are too few images.
    """

    def __init__(
        self,
        model: CAT,
        data: ImageData,
        recipe: Recipe,
        processes: Processes | None = None,
        workers: int = 0,
    ) -> None:
        self.processes = processes or Processes()
        self.data = data
        self.recipe = recipe
        self.workers = workers
        count = self.processes.count
        if recipe.batch_size % count:
            raise ValueError(
                f"batch_size must be divisible by the {count} processes, got {recipe.batch_size}"
            )
        # what is left of the images after the last whole batch waits for another epoch's order
        self.steps_per_epoch = len(data.train) // recipe.batch_size
        if not self.steps_per_epoch:
            raise ValueError(
                f"batch_size must be at most the {len(data.train)} training images, "
                f"got {recipe.batch_size}"
            )
        self.steps = recipe.epochs * self.steps_per_epoch
        device = self.processes.device
        self.model = model.to(device)
        self.network: nn.Module = model if count == 1 else DistributedDataParallel(model)
        self.optimizer = make_optimizer(model, recipe)
        self.schedule = make_schedule(self.optimizer, recipe, self.steps)
        # half precision's range is too small for the gradients of a mean over a batch
        is_half = recipe.precision == "fp16"
        self.scaler = torch.amp.grad_scaler.GradScaler(device.type, enabled=is_half)
        self.step = 0
        self.losses = torch.zeros(self.steps, device=device, dtype=next(model.parameters()).dtype)
        self.epochs: list[Epoch] = []

    def run(self) -> Iterator[Epoch | None]:
        """Train from the present step to the last; yields after each what epoch it ended, if any.

        Raises:
            ValueError: the loss is not finite any more.
        """
        while self.step < self.steps:
            epoch, done = divmod(self.step, self.steps_per_epoch)
            start = time.perf_counter()
            for images, labels in self._batches(epoch, done):
                self._train_step(images, labels)
                ends_epoch = self.step % self.steps_per_epoch == 0
                if ends_epoch:
                    self.epochs.append(self._finish_epoch(epoch, start))
                yield self.epochs[-1] if ends_epoch else None

    def state_dict(self) -> dict[str, Any]:
        """All that training from the present step on depends on, beside the recipe and the data."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "losses": self.losses,
            "epochs": [asdict(epoch) for epoch in self.epochs],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back, or on, to where `state_dict` was called."""
        for name in ("model", "optimizer", "schedule", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]
        self.losses.copy_(state["losses"])
        self.epochs = [Epoch(**epoch) for epoch in state["epochs"]]

    def _batches(self, epoch: int, done: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of each batch of an epoch, but for the first ``done``."""
        count = self.processes.count
        share = self.recipe.batch_size // count
        sampler: DistributedSampler[Any] = DistributedSampler(
            self.data.train, count, self.processes.rank, seed=self.recipe.seed, drop_last=True
        )
        sampler.set_epoch(epoch)
        remaining = list(sampler)[done * share : self.steps_per_epoch * share]
        return iter(self._loader(self.data.train, share, sampler=remaining))

    def _loader(self, dataset: Dataset[Any], batch_size: int, **options: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size,
            num_workers=self.workers,
            pin_memory=self.processes.device.type != "cpu",
            # its own, since the loader would draw from DropPath's
            generator=torch.Generator(),
            **options,
        )

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        recipe, rank, count = self.recipe, self.processes.rank, self.processes.count
        # the whole batch's maps in every process, so that an image's does not depend on who has it
        generator = torch.Generator().manual_seed(_seed(recipe.seed, self.step, 0))
        maps = self.data.augmentation.draw(recipe.batch_size, generator)[rank::count]
        torch.manual_seed(_seed(recipe.seed, self.step, 1 + rank))

        self.model.train()
        self.optimizer.zero_grad()
        images, labels, maps = (self._to_device(tensor) for tensor in (images, labels, maps))
        with _repeatable_convolutions():
            logits = self._logits(self.network, warp(images, maps))
            loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
            self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.losses[self.step] = self.processes.total(loss.detach() / count)
        self.step += 1

    def _finish_epoch(self, epoch: int, start: float) -> Epoch:
        first = epoch * self.steps_per_epoch
        train_loss = self.losses[first : self.step].mean().item()
        if not math.isfinite(train_loss):
            raise ValueError(
                f"the loss became {train_loss} in epoch {epoch + 1}: train with a learning_rate "
                f"below {self.recipe.learning_rate:g}, or in another precision than "
                f"{self.recipe.precision}"
            )
        test_loss, test_accuracy = self.evaluate()
        return Epoch(
            epoch=epoch + 1,
            learning_rate=float(self.schedule.get_last_lr()[0]),
            train_loss=train_loss,
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            seconds=time.perf_counter() - start,
        )

    @torch.inference_mode()
    def evaluate(self) -> tuple[float, float]:
        """The mean loss and the accuracy on the held-out images."""
        rank, count = self.processes.rank, self.processes.count
        share = Subset(self.data.test, range(rank, len(self.data.test), count))
        sums = torch.zeros(2, dtype=torch.float64, device=self.processes.device)
        self.model.eval()
        for images, labels in self._loader(share, self.recipe.batch_size // count):
            labels = self._to_device(labels)
            logits = self._logits(self.model, self._to_device(images))
            sums[0] += F.cross_entropy(logits, labels, reduction="sum")
            sums[1] += (logits.argmax(-1) == labels).sum()
        loss, accuracy = (self.processes.total(sums) / len(self.data.test)).tolist()
        return loss, accuracy

    def _logits(self, network: nn.Module, images: Tensor) -> Tensor:
        """(B, num_classes) in the dtype of the weights, whatever they were computed in."""
        weights_dtype = next(self.model.parameters()).dtype
        precision = PRECISIONS[self.recipe.precision]
        is_mixed = precision != torch.float32
        with torch.autocast(images.device.type, precision, enabled=is_mixed):
            logits = network(images.to(weights_dtype))
        return logits.to(weights_dtype)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.processes.device, non_blocking=True)


@contextmanager
def _repeatable_convolutions() -> Iterator[None]:
    """Keep cuDNN from sums in no fixed order, which the patch embedding's gradient may be."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def _seed(*parts: int) -> int:
    """One seed out of several numbers, none like its neighbours'."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])
