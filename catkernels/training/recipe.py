"""The paper's recipe: AdamW, cosine with warm-up, label smoothing, no decay of biases, clipping.

Source: "CAT: Cross Attention in Vision Transformer" (arXiv 2106.05786), section 4.1, without its
mixup and cutmix; what an image may undergo instead is `catkernels.training.data.Augmentation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from catkernels.cat import CAT

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are the paper's.

    Attributes:
        epochs: how often every image is seen.
        batch_size: images of a step, in all processes together.
        learning_rate: its peak for a batch of 512; for other batches it is in proportion.
        warmup: share of the steps in which the learning rate rises to its peak.
        weight_decay: of weight matrices; norms, biases and position biases do not decay.
        label_smoothing: share of the target that all classes have in common.
        clip_norm: largest norm of the gradient.
        seed: of the weights, the order of the images, their augmentation and DropPath.
        precision: "fp32", or "bf16" or "fp16" for mixed precision.

    Raises:
        ValueError: a value makes no sense.
    """

    epochs: int = 300
    batch_size: int = 512
    learning_rate: float = 5e-4
    warmup: float = 20 / 300
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    clip_norm: float = 5.0
    seed: int = 0
    precision: str = "fp32"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be more than 0, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}"
            )

    @property
    def peak_learning_rate(self) -> float:
        """The highest learning rate that this batch size is trained with."""
        return self.learning_rate * self.batch_size / 512


def make_optimizer(model: CAT, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays weight matrices only, and of these not those the model asks to spare."""
    spared = model.no_weight_decay()

    def decays(name: str, parameter: torch.nn.Parameter) -> bool:
        return parameter.dim() > 1 and name not in spared

    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named if decays(name, p)]},
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.peak_learning_rate, weight_decay=recipe.weight_decay)


def make_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> SequentialLR:
    """The learning rate of each of ``steps`` steps: up from 1/1000, then down to 1/100."""
    warmup_steps = max(1, round(recipe.warmup * steps))
    schedules = [
        LinearLR(optimizer, start_factor=1e-3, total_iters=warmup_steps),
        CosineAnnealingLR(
            optimizer,
            T_max=max(1, steps - warmup_steps),
            eta_min=recipe.peak_learning_rate / 100,
        ),
    ]
    return SequentialLR(optimizer, schedules, milestones=[warmup_steps])
