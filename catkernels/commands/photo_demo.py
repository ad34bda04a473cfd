"""Run a CAT on a photograph, in the official order of operations and patched, and compare."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor

from catkernels import official
from catkernels.commands.models import MODELS, Checkpoint, default_size
from catkernels.images import ink, middle_square, normalised, read_photo
from catkernels.patching.patch import patch
from catkernels.patching.report import PatchReport
from catkernels.torch_state.device import best_device

try:
    import PIL.Image
    from tqdm import tqdm

    from catkernels.commands.photo_picture import Stage, draw
except ImportError as error:
    raise ImportError(f"the demo needs {error.name}: pip install 'catkernels[demo]'") from error

REPEATS = 5
# A stage's times are void where the official operations differ by more from themselves.
NOISE = 0.1


def run(
    model: str,
    trained: Checkpoint | None,
    *,
    image: Path | None,
    size: int | None,
    batch: int,
    save: Path,
) -> None:
    """Print what patching changes, and save a picture of it.

    Raises:
        OSError: the picture cannot be written.
        ValueError: the image cannot be read, or the checkpoint is not of this model.
    """
    side = size or (trained.size if trained else default_size(model))
    photo = _load_photo(image, side)
    torch.manual_seed(0)
    options = trained.options if trained else MODELS[model] | {"num_classes": 0}
    network = official.CAT(**options, pads=True)
    if trained:
        print(trained.load_into(network))
    device = best_device()
    network = network.to(device).eval()
    prepared = (ink if network.patch_embed.in_chans == 1 else normalised)(photo)
    images = prepared.repeat(batch, 1, 1, 1).to(device)

    stages, report = compare(network, images)
    weights = trained.path.name if trained else "random weights"
    title = f"{model}, {weights}, {batch} x {side} x {side}, float32 on {device}"
    _print_comparison(title, report, stages)
    draw(photo, title, stages).savefig(save, dpi=150)
    print(f"picture: {save}")


def _load_photo(path: Path | None, size: int) -> PIL.Image.Image:
    """A photo, its middle square scaled to ``size`` x ``size``."""
    if path is not None:
        return read_photo(path, size)
    from sklearn.datasets import load_sample_image

    return middle_square(PIL.Image.fromarray(load_sample_image("china.jpg")), size)


def compare(network: official.CAT, images: Tensor) -> tuple[list[Stage], PatchReport]:
    """Each stage of a network as it is and patched.

    As the benchmarks do it: in turn, since a machine's speed drifts, and the official operations
    twice, to know how far.
    """
    patched = deepcopy(network)
    report = patch(patched)
    contenders = (network, patched, network)
    with tqdm(
        desc="as it is and patched",
        total=len(contenders) * (1 + REPEATS),
        # None: only where the output is a terminal
        disable=None,
        leave=False,
    ) as bar:
        maps = []
        for contender in contenders:  # which warms them up
            maps.append([x[0].float().cpu() for x in _timed_pass(contender, images)[0]])
            bar.update()
        rounds: list[list[list[float]]] = []
        for _ in range(REPEATS):
            rounds.append([])
            for contender in contenders:
                rounds[-1].append(_timed_pass(contender, images)[1])
                bar.update()

    typical: Callable[[Iterable[float]], float] = (
        min if images.device.type == "cpu" else statistics.median
    )
    stages = []
    for stage, (before, after, _) in enumerate(zip(*maps, strict=True)):
        times = zip(*([ms[stage] for ms in one_round] for one_round in rounds), strict=True)
        official_ms, patched_ms, again_ms = map(typical, times)
        stages.append(
            Stage(
                official=before,
                patched=after,
                official_ms=official_ms,
                patched_ms=patched_ms,
                is_void=abs(official_ms / again_ms - 1) > NOISE,
                served_by=_served_by(report, stage, images.device),
            )
        )
    return stages, report


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


def _served_by(report: PatchReport, stage: int, device: torch.device) -> str:
    """ "triton", or what each of both attentions is served by."""
    served: dict[str, str] = {}
    for block in report.blocks:
        if block.name.startswith(f"layers.{stage}."):
            # the reference infers on a CPU in slices of the batch, see `catkernels.cpu`
            sliced = block.backend == "reference" and device.type == "cpu"
            served[block.kind] = "cpu slices" if sliced else block.backend
    if len(set(served.values())) == 1:
        return next(iter(served.values()))
    return ", ".join(f"{kind} {backend}" for kind, backend in served.items())


def _print_comparison(title: str, report: PatchReport, stages: Sequence[Stage]) -> None:
    """A table of 80 columns."""
    print(f"{title}\n{len(report.swapped)} blocks patched\n")
    row = "{:6}{:12}{:24}{:>10}{:>10}{:>9}{:>9}"
    print(row.format("", "", "", "official", "patched", "", "differ"))
    print(row.format("stage", "map", "served by", "ms/image", "ms/image", "faster", "by up to"))
    for number, stage in enumerate(stages, 1):
        was, now = stage.official_ms, stage.patched_ms
        print(
            row.format(
                str(number),
                "x".join(map(str, stage.official.shape)),
                stage.served_by,
                f"{was:.2f}",
                f"{now:.2f}",
                f"{was / now:.2f}x" + ("*" if stage.is_void else ""),
                f"{stage.difference.max():.0e}",
            )
        )
    was, now = sum(s.official_ms for s in stages), sum(s.patched_ms for s in stages)
    is_void = any(stage.is_void for stage in stages)
    faster = f"{was / now:.2f}x" + "*" * is_void
    print(row.format("total", "", "", f"{was:.2f}", f"{now:.2f}", faster, ""))
    if is_void:
        print("* void: the official operations, timed twice, differed by more than a tenth")
    print(f"the values of the maps reach {max(stage.largest_value for stage in stages):.1f}")
    for reason in sorted({block.reason for block in report.blocks if block.reason}):
        print(f"why not Triton: {reason}")
    for note in report.notes:
        print(f"note: {note}")
