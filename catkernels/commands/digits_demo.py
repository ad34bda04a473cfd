"""Classify handwritten digits with weights that ship; draw where CAT looks, and its mistakes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from torch import Tensor

from catkernels.block import CATBlock
from catkernels.cat import CAT
from catkernels.commands.models import Checkpoint
from catkernels.digits import IMAGE_SIZE, pretrained_digits
from catkernels.reference import ceil_div, from_windows
from catkernels.torch_state.device import best_device
from catkernels.training.data import digits_data

# How many are drawn.
MOST_MISTAKES = 10


@dataclass(frozen=True)
class Answers:
    """What a model makes of images of digits.

    Attributes:
        images: (B, 1, H, W).
        labels: the digits (B,) that they show.
        told: the digits (B,) that the model takes them for.
        confidence: how probable it calls that, (B,).
    """

    images: Tensor
    labels: Tensor
    told: Tensor
    confidence: Tensor

    def __getitem__(self, index: Tensor | list[int]) -> Answers:
        return Answers(*(getattr(self, field.name)[index] for field in fields(self)))

    def __len__(self) -> int:
        return len(self.labels)


def run(trained: Checkpoint | None, *, save: Path) -> None:
    """Print how many held-out digits are told rightly, and draw ten of them and the mistakes.

    Args:
        trained: weights of a training run of one's own; None: those that ship.
        save: where the picture goes.

    Raises:
        OSError: the picture cannot be written.
        ValueError: the checkpoint is not of this model.
    """
    device = best_device()
    if trained is None:
        model, size = pretrained_digits(), IMAGE_SIZE
    else:
        model, size = CAT(**trained.options), trained.size
        print(trained.load_into(model))
    model = model.to(device).eval()
    held_out: Any = digits_data(size).test
    images, labels = (t.to(device) for t in held_out[:])
    with torch.inference_mode():
        confidence, told = model(images).softmax(-1).max(-1)
    answers = Answers(images, labels, told, confidence)
    wrong = answers[(told != labels).nonzero().flatten()]
    wrong = wrong[wrong.confidence.argsort(descending=True)]

    shown = answers[[int((labels == digit).nonzero()[0]) for digit in range(10)]]
    print("held-out digit  classified as")
    for label, answer, share in zip(shown.labels, shown.told, shown.confidence, strict=True):
        print(f"{label:14}  {answer} ({100 * share:.0f} %)")
    right = len(answers) - len(wrong)
    print(f"{right} of {len(answers)} held-out digits right, {100 * right / len(answers):.1f} %")
    _draw(model, shown, wrong, len(answers)).savefig(save, dpi=150)
    print(f"picture: {save}")


def attention_weights(model: CAT, block: CATBlock, images: Tensor) -> Tensor:
    """The weights of one block's attention, for images (B, C, H, W); see `IPSA` and `CPSA`."""
    inputs = []
    remember = block.attn.register_forward_pre_hook(lambda _, arguments: inputs.extend(arguments))
    with torch.inference_mode():
        with remember:
            model(images)
        _, weights = block.attn(*inputs, return_attention=True)
    return weights


def ipsa_map(weights: Tensor, height: int, width: int) -> Tensor:
    """How much each pixel is looked at by the pixels of its window, over an even share.

    The weights (B, windows, heads, N*N, N*N) of an H x W map -> (B, H, W), of mean 1.
    """
    pixels = weights.shape[-1]
    received = weights.mean((2, 3)) * pixels
    return from_windows(received[..., None], isqrt(pixels), height, width)[..., 0]


def cpsa_map(weights: Tensor, query: Tensor, height: int, width: int) -> Tensor:
    """How much the patch of index ``query`` (B,) looks at each patch, over an even share.

    The weights (B, C, P, P) of an H x W map of P patches -> (B, H, W), of mean 1.
    """
    patches = weights.shape[-1]
    images = torch.arange(len(query), device=query.device)
    given = weights.mean(1)[images, query] * patches  # (B, P)
    side = isqrt(height * width // patches)
    pixels = given[..., None, None].expand(-1, -1, side**2, 1)
    return from_windows(pixels, side, height, width)[..., 0]


def _draw(model: CAT, shown: Answers, wrong: Answers, total: int) -> Figure:
    """Ten digits and where both attentions of the first stage look; below, the surest mistakes."""
    figure = Figure(figsize=(14, 6.8), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(4.6, 2.2))
    top, bottom = parts
    top.suptitle("held-out digits, and where stage 1 of CAT looks")
    _draw_attention(top.subplots(3, len(shown), squeeze=False), model, shown)
    _draw_mistakes(bottom, wrong, total)
    return figure


def _draw_attention(panels: np.ndarray, model: CAT, shown: Answers) -> None:
    """A column for each digit: the image, and both attentions over it."""
    images = shown.images
    stage: Any = model.layers[0]
    side = stage.cpsa_blocks[0].patch_size
    height, width = images.shape[2:]
    rows, columns = ceil_div(height, side), ceil_div(width, side)
    query = F.avg_pool2d(images, side, ceil_mode=True).flatten(1).argmax(1)  # the most ink
    padded = (rows * side, columns * side)
    ipsa = attention_weights(model, stage.pre_ipsa_blocks[0], images)
    cpsa = attention_weights(model, stage.cpsa_blocks[0], images)
    heats = [
        heat[:, :height, :width].cpu().numpy()
        for heat in (ipsa_map(ipsa, *padded), cpsa_map(cpsa, query, *padded))
    ]
    names = (
        "classified as",
        "IPSA: looked at\nwithin its patch",
        "CPSA: what the\nboxed patch sees",
    )
    for axes, name in zip(panels[:, 0], names, strict=True):
        axes.set_ylabel(name)
    for column, axes in enumerate(panels[0]):
        _show(axes, images[column])
        axes.set_title(f"{shown.told[column]} ({100 * shown.confidence[column]:.0f} %)")
    for row, heat in zip(panels[1:], heats, strict=True):
        # a few pixels stand out so far that the rest would be dark beside them
        most = np.quantile(heat, 0.995)
        for column, axes in enumerate(row):
            axes.set(xticks=[], yticks=[])
            drawn = axes.imshow(heat[column], cmap="magma", vmin=0, vmax=most)
            digit = images[column, 0].cpu().numpy()
            axes.contour(digit, levels=[-0.4], colors="white", linewidths=1, linestyles="solid")
        bar = row[0].figure.colorbar(drawn, ax=row, fraction=0.05, extend="max")
        bar.set_label("times its\neven share")
    for axes, patch in zip(panels[2], query.tolist(), strict=True):
        y, x = divmod(patch, columns)
        corner = (x * side - 0.5, y * side - 0.5)
        axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor="cyan", linewidth=1.5))


def _draw_mistakes(figure: SubFigure, wrong: Answers, total: int) -> None:
    """The digits that were taken for others, those first of which the model was surest."""
    more = f", the {MOST_MISTAKES} surest of them here" if len(wrong) > MOST_MISTAKES else ""
    figure.suptitle(f"{len(wrong)} mistakes in {total} held-out digits{more}")
    if not len(wrong):
        return
    for index, axes in enumerate(figure.subplots(1, MOST_MISTAKES)):
        if index >= len(wrong):
            axes.set_axis_off()
            continue
        _show(axes, wrong.images[index])
        axes.set_title(f"is a {wrong.labels[index]}", fontsize=11)
        axes.set_xlabel(f"told as {wrong.told[index]}\n({100 * wrong.confidence[index]:.0f} %)")


def _show(axes: Axes, image: Tensor) -> None:
    axes.set(xticks=[], yticks=[])
    axes.imshow(image[0].cpu().numpy(), cmap="gray_r", vmin=-1, vmax=1)
