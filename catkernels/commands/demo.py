"""Run a CAT on a photograph, in the official order of operations and patched, and compare."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from catkernels import official
from catkernels.cat import VARIANTS
from catkernels.checkpoint import load_checkpoint
from catkernels.images import middle_square, normalised, read_photo
from catkernels.patching.patch import patch, unpatch
from catkernels.patching.report import PatchReport
from catkernels.torch_state.device import best_device

try:
    import numpy as np
    import PIL.Image
    from matplotlib.figure import Figure
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f"the demo needs {error.name}: pip install 'catkernels[demo]'") from error

REPEATS = 7


@dataclass
class Run:
    """What one model did with the images.

    Attributes:
        maps: the output (B, H_i, W_i, C_i) of each stage.
        stage_ms: milliseconds an image in each stage, the median of the passes.
        peak_mib: the memory that one pass needs at its peak; None where the system does not tell.
    """

    maps: list[Tensor]
    stage_ms: list[float]
    peak_mib: float | None


def run(
    *, model: str, image: Path | None, size: int, batch: int, checkpoint: Path | None, save: Path
) -> None:
    """Print what patching changes, and save a picture of it.

    Raises:
        OSError: the picture cannot be written.
        ValueError: the image cannot be read, or the checkpoint is not of this model.
    """
    photo = _load_photo(image, size)
    device = best_device()
    torch.manual_seed(0)
    network = official.CAT(**VARIANTS[model], img_size=size, out_indices=(0, 1, 2, 3))
    if checkpoint is not None:
        print(load_checkpoint(network, checkpoint))
    network = network.to(device).eval()
    images = normalised(photo).repeat(batch, 1, 1, 1).to(device)

    before, after, report = _compare(network, images)
    weights = "random weights" if checkpoint is None else checkpoint.name
    title = f"{model}, {weights}, {batch} x {size} x {size}, float32 on {device}"
    _print_comparison(title, report, before, after)
    _draw(photo, title, before, after).savefig(save, dpi=150)
    print(f"picture: {save}")


def _load_photo(path: Path | None, size: int) -> PIL.Image.Image:
    """A photo, its middle square scaled to ``size`` x ``size``."""
    if path is not None:
        return read_photo(path, size)
    from sklearn.datasets import load_sample_image

    return middle_square(PIL.Image.fromarray(load_sample_image("china.jpg")), size)


def _compare(network: official.CAT, images: Tensor) -> tuple[Run, Run, PatchReport]:
    """The model as it is and patched, pass by pass in turn since a machine's speed drifts."""
    passes: dict[str, list] = {"before": [], "after": []}
    peaks = {}
    # disable=None: only where the output is a terminal
    total = 2 * (REPEATS + 2)
    with tqdm(desc="as it is and patched", total=total, disable=None, leave=False) as bar:
        for repeat in range(REPEATS + 2):
            for which, results in passes.items():
                report = patch(network) if which == "after" else None
                if repeat == REPEATS + 1:
                    peaks[which] = _peak_mib(lambda: _timed_pass(network, images))
                else:
                    results.append(_timed_pass(network, images))
                if which == "after":
                    unpatch(network)
                bar.update()
    runs = []
    for which, results in passes.items():
        passes_ms = [ms for _, ms in results[1:]]  # the first pass warms up
        stage_ms = [statistics.median(times) for times in zip(*passes_ms, strict=True)]
        runs.append(Run(results[0][0], stage_ms, peaks[which]))
    return *runs, report


def _timed_pass(network: official.CAT, images: Tensor) -> tuple[list[Tensor], list[float]]:
    """The output of each stage, and the milliseconds that it took for each image."""
    maps, stage_ms = [], []
    with torch.inference_mode():
        stages = network.stage_maps(images)
        for _ in network.layers:
            start = _now(images.device)
            maps.append(next(stages))
            stage_ms.append((_now(images.device) - start) * 1e3 / len(images))
    return maps, stage_ms


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter()


def _peak_mib(work: Callable[[], object]) -> float | None:
    """The highest memory in use during ``work`` over that before it."""
    device = best_device()
    if device.type != "cpu":
        memory = torch.get_device_module(device)
        memory.reset_peak_memory_stats()
        start = memory.memory_allocated()
        work()
        return (memory.max_memory_allocated() - start) / 2**20
    try:
        # hand memory kept from earlier passes back, and restart the kernel's record of the peak
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        start = _status_kib("VmRSS")
        work()
        return (_status_kib("VmHWM") - start) / 2**10
    except (OSError, AttributeError, TypeError):
        # no such files, or no such function, on this system
        return None


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _print_comparison(title: str, report: PatchReport, before: Run, after: Run) -> None:
    print(f"{title}: {len(report.swapped)} blocks patched\n")
    print("          map          served by               official    patched             largest")
    print(
        "                                               ms/image   ms/image  speed-up  difference"
    )
    for stage, (old, new) in enumerate(zip(before.maps, after.maps, strict=True)):
        blocks = [b for b in report.blocks if b.name.startswith(f"layers.{stage}.")]
        served = ", ".join(sorted({f"{b.kind} {b.backend}" for b in blocks}))
        was, now = before.stage_ms[stage], after.stage_ms[stage]
        shape = "x".join(map(str, old.shape[1:]))
        difference = (old - new).abs().max().item()
        print(
            f"{stage + 1:<8}{shape:12}{served:31}{was:10.2f}{now:9.2f}{was / now:8.2f}x"
            f"  {difference:10.1e}"
        )
    was, now = sum(before.stage_ms), sum(after.stage_ms)
    print(f"{'total':51}{was:10.2f}{now:9.2f}{was / now:8.2f}x")
    if before.peak_mib is not None and after.peak_mib is not None:
        print(f"peak memory of a pass: {before.peak_mib:.0f} MiB, {after.peak_mib:.0f} patched")
    for reason in sorted({block.reason for block in report.blocks if block.reason}):
        print(f"why not Triton: {reason}")
    for note in report.notes:
        print(f"note: {note}")


def _draw(photo: PIL.Image.Image, title: str, before: Run, after: Run) -> Figure:
    """The photo, the four stages' maps, and the time that each stage takes."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    figure.suptitle(title)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    panels = top.subplots(1, 1 + len(after.maps))
    panels[0].imshow(photo)
    panels[0].set_title("photo")
    for stage, (panel, stage_map) in enumerate(zip(panels[1:], after.maps, strict=True), 1):
        panel.imshow(stage_map[0].float().norm(dim=-1).cpu().numpy(), cmap="magma")
        panel.set_title(f"stage {stage}: |features|")
    for panel in panels:
        panel.set_axis_off()

    axes = bottom.subplots()
    places = np.arange(len(before.stage_ms))
    for offset, label, result in ((-0.2, "official", before), (0.2, "patched", after)):
        bars = axes.bar(places + offset, result.stage_ms, 0.4, label=label)
        axes.bar_label(bars, fmt="%.2f", padding=2)
    axes.set_xticks(places, [f"stage {stage + 1}" for stage in places])
    axes.set_ylabel("ms per image, median")
    axes.margins(y=0.15)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
