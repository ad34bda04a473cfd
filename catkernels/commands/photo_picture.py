"""The picture of the photo demo: both models' maps, how far they are apart, and their times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXPLANATION = """\
Each pixel of a map
has a vector of features.

Rows 1 and 2:
how long it is.

Row 3:
how far both models
are apart in it, at most."""


@dataclass(frozen=True)
class Stage:
    """What one stage of the network did with the images, before and after patching.

    Attributes:
        official, patched: its map (H, W, C) of the first image, in float32 on the CPU.
        official_ms, patched_ms: milliseconds an image.
        is_void: whether the official operations, timed twice, took too different times.
        served_by: what runs the patched blocks.
    """

    official: Tensor
    patched: Tensor
    official_ms: float
    patched_ms: float
    is_void: bool
    served_by: str

    @property
    def difference(self) -> Tensor:
        """How far the maps are apart, at most, in each pixel: (H, W)."""
        return (self.official - self.patched).abs().amax(-1)

    @property
    def largest_value(self) -> float:
        """Of the official map."""
        return self.official.abs().max().item()


def draw(photo: PIL.Image.Image, title: str, stages: Sequence[Stage]) -> Figure:
    """A column for each stage: its map before and after patching, and the difference; the times."""
    figure = Figure(figsize=(13, 9.5), layout="constrained")
    figure.suptitle(
        "CAT on a photo, as the official code computes it and patched by catkernels: both agree to "
        f"{max(stage.difference.max().item() for stage in stages):.0e}\n{title}"
    )
    parts: Any = figure.subfigures(2, 1, height_ratios=(2.7, 1))
    top, bottom = parts
    panels = top.subplots(3, 1 + len(stages))
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
    for axes in panels[1:, 0]:
        axes.set_axis_off()
    panels[0, 0].imshow(photo)
    panels[0, 0].set_title("the photo")
    panels[1, 0].text(0.5, 1, EXPLANATION, ha="center", va="top", transform=panels[1, 0].transAxes)
    for axes, name in zip(panels[:, 1], ("official", "patched", "difference"), strict=True):
        axes.set_ylabel(name, fontsize=13)
    for number, (column, stage) in enumerate(zip(panels[:, 1:].T, stages, strict=True), 1):
        height, width, channels = stage.official.shape
        column[0].set_title(f"stage {number}: {height} x {width} x {channels}")
        bars = _draw_stage(column, stage)
        if number == len(stages):
            labels = ("length of the vector", "length of the vector", "largest difference")
            for bar, label in zip(bars, labels, strict=True):
                bar.set_label(label)
    _draw_times(bottom.subplots(), stages)
    return figure


def _draw_stage(cells: Sequence[Axes], stage: Stage) -> list[Colorbar]:
    """One column: the official map, the patched one in the same colours, and the difference."""
    lengths = [stage.official.norm(dim=-1).numpy(), stage.patched.norm(dim=-1).numpy()]
    lowest, highest = lengths[0].min(), lengths[0].max()
    difference = stage.difference.numpy()
    images = [
        axes.imshow(length, cmap="magma", vmin=lowest, vmax=highest)
        for axes, length in zip(cells[:2], lengths, strict=True)
    ]
    images.append(cells[2].imshow(difference, cmap="viridis", vmin=0))
    cells[2].set_xlabel(
        f"at most {difference.max():.1e}\nin values up to {stage.largest_value:.1f}", fontsize=11
    )
    return [
        axes.figure.colorbar(image, ax=axes, fraction=0.046)
        for axes, image in zip(cells, images, strict=True)
    ]


def _draw_times(axes: Axes, stages: Sequence[Stage]) -> None:
    """A pair of bars for each stage."""
    places = np.arange(len(stages))
    times = {
        "official": ([stage.official_ms for stage in stages], -0.2, "0.6"),
        "patched": ([stage.patched_ms for stage in stages], 0.2, "C1"),
    }
    for name, (milliseconds, offset, colour) in times.items():
        bars = axes.bar(places + offset, milliseconds, 0.4, label=name, color=colour)
        axes.bar_label(bars, fmt="%.2f", padding=2)
    labels = []
    for number, stage in enumerate(stages, 1):
        faster = f"{stage.official_ms / stage.patched_ms:.2f}x as fast"
        if stage.is_void:
            faster = "void: a noisy moment"
        labels.append(f"stage {number}\n{faster}\nby {stage.served_by}")
    axes.set_xticks(places, labels)
    axes.set_ylabel("ms an image")
    axes.margins(y=0.2)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
