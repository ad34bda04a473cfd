"""Classify handwritten digits with the weights that ship, and draw where CAT looks."""

from __future__ import annotations

from math import isqrt
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from catkernels.block import CATBlock
from catkernels.cat import CAT
from catkernels.checkpoint import load_checkpoint
from catkernels.digits import pretrained_digits
from catkernels.reference import from_windows
from catkernels.torch_state.device import best_device
from catkernels.training.data import digits_data


def run(*, checkpoint: Path | None, save: Path) -> None:
    """Print how many held-out digits are told rightly, and draw both attentions over ten of them.

    Args:
        checkpoint: weights of a training run of one's own; None: those that ship.
        save: where the picture goes.

    Raises:
        OSError: the picture cannot be written.
        ValueError: the checkpoint is not of this model.
    """
    device = best_device()
    model = pretrained_digits().to(device)
    if checkpoint is not None:
        print(load_checkpoint(model, checkpoint))
    images, labels = (t.to(device) for t in digits_data().test[:])
    with torch.inference_mode():
        probabilities = model(images).softmax(-1)
    predicted = probabilities.argmax(-1)
    right = int((predicted == labels).sum())

    shown = [int((labels == digit).nonzero()[0]) for digit in range(10)]
    print("held-out digit  classified as")
    for index in shown:
        print(f"{labels[index]:14}  {predicted[index]} ({100 * probabilities[index].max():.0f} %)")
    print(f"{right} of {len(labels)} held-out digits right, {100 * right / len(labels):.1f} %")
    figure = _draw(model, images[shown], predicted[shown])
    figure.savefig(save, dpi=150)
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


def _draw(model: CAT, images: Tensor, predicted: Tensor) -> Figure:
    """A column for each digit: the image, and both attentions of the first stage over it."""
    stage, size, side = model.layers[0], images.shape[2:], model.patch_size
    ink = F.avg_pool2d(images, side).flatten(1)  # (B, P)
    query = ink.argmax(1)
    ipsa = attention_weights(model, stage.pre_ipsa_blocks[0], images)
    cpsa = attention_weights(model, stage.cpsa_blocks[0], images)
    heats = [None, ipsa_map(ipsa, *size).cpu().numpy(), cpsa_map(cpsa, query, *size).cpu().numpy()]

    figure = Figure(figsize=(1.25 * len(images) + 1.5, 4.6), layout="constrained")
    figure.suptitle("held-out digits, and where stage 1 of CAT looks: attention in even shares")
    panels = figure.subplots(len(heats), len(images))
    names = (
        "classified as",
        "IPSA: looked at\nwithin its patch",
        "CPSA: what the\nboxed patch sees",
    )
    for row, heat, name in zip(panels, heats, names, strict=True):
        row[0].set_ylabel(name)
        for column, axes in enumerate(row):
            axes.set(xticks=[], yticks=[])
            digit = images[column, 0].cpu().numpy()
            if heat is None:
                axes.imshow(digit, cmap="gray_r")
                axes.set_title(int(predicted[column]))
            else:
                # a few pixels stand out so far that the rest would be dark beside them
                most = np.quantile(heat, 0.995)
                shown = axes.imshow(heat[column], cmap="magma", vmin=0, vmax=most)
                axes.contour(digit, levels=[-0.4], colors="white", linewidths=1, linestyles="solid")
        if heat is not None:
            figure.colorbar(shown, ax=row, fraction=0.05, extend="max")
    for axes, patch in zip(panels[2], query.tolist(), strict=True):
        y, x = divmod(patch, size[1] // side)
        corner = (x * side - 0.5, y * side - 0.5)
        axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor="cyan", linewidth=1.5))
    return figure
