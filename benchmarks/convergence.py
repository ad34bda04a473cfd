"""The digits model, trained with the official operations, the reference and the kernels, compared.

    python -m benchmarks.convergence --save convergence.png

trains it each way from the same weights on the same batches, in float32 (on a GPU in TF32, since
it has no kernel of CPSA's backward pass for exact products) and in bfloat16, draws the losses side
by side, and writes them as ``convergence.csv`` beside the picture, both anew after each run. Where
the kernels cannot run it says why and compares the rest.
"""

from __future__ import annotations

import argparse
import csv
import platform
import sys
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure

import catkernels
from catkernels import machine, official
from catkernels.commands.train import DIGITS_RECIPE
from catkernels.digits import DIGITS
from catkernels.reference import ceil_div
from catkernels.torch_state.device import best_device, device_reasons
from catkernels.training.data import digits_data
from catkernels.training.trainer import Trainer

WAYS = {
    "official": lambda: official.CAT(**DIGITS),
    "reference": lambda: catkernels.CAT(**DIGITS, backend="reference"),
    "kernels": lambda: catkernels.CAT(**DIGITS, backend="triton"),
}
PRECISIONS = ("fp32", "bf16")
# the later ones thinner, so that equal curves all show
LINES = {"official": ("C7", 4), "reference": ("C0", 2), "kernels": ("C1", 1)}


def losses(way: str, precision: str, steps: int) -> list[float]:
    """The training loss of each step."""
    data = digits_data()
    epochs = ceil_div(steps, len(data.train) // DIGITS_RECIPE.batch_size)
    torch.manual_seed(0)
    recipe = replace(DIGITS_RECIPE, epochs=epochs, precision=precision)
    trainer = Trainer(WAYS[way](), data, recipe)
    for _ in trainer.run():
        if trainer.step == steps:
            break
    return trainer.losses[:steps].tolist()


def draw(curves: dict[tuple[str, str], list[float]], where: str) -> Figure:
    """A panel for each precision: the losses of each way, and the distance from the official's."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    figure.suptitle(f"training loss of the digits model, {where}")
    precisions = list(dict.fromkeys(precision for _, precision in curves))
    panels = figure.subplots(
        2, len(precisions), sharex=True, sharey="row", height_ratios=(2, 1), squeeze=False
    )
    for (top, bottom), precision in zip(panels.T, precisions, strict=True):
        top.set_title(precision)
        truth = curves["official", precision]
        for way, (color, width) in LINES.items():
            curve = curves.get((way, precision))
            if curve is None:
                continue
            steps = range(1, len(curve) + 1)
            top.plot(steps, curve, label=way, linewidth=width, color=color)
            if way != "official":
                distance = [abs(a - b) for a, b in zip(curve, truth, strict=True)]
                bottom.plot(steps, distance, linewidth=width, color=color)
        top.legend(frameon=False)
        # equal curves, at a distance of 0, show as well
        bottom.set_yscale("symlog", linthresh=1e-7)
        bottom.set_xlabel("step")
    panels[0, 0].set_ylabel("cross-entropy")
    panels[1, 0].set_ylabel("distance from official")
    panels[1, 0].set_ylim(bottom=0)
    return figure


def save(curves: dict[tuple[str, str], list[float]], where: str, path: Path) -> None:
    """The picture, and the numbers beside it."""
    with path.with_suffix(".csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["step", *(f"{way} {precision}" for way, precision in curves)])
        table.writerows(
            [step, *values] for step, values in enumerate(zip(*curves.values(), strict=True), 1)
        )
    draw(curves, where).savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--save", type=Path, default=Path("convergence.png"), metavar="FILE.png")
    options = parser.parse_args()

    device = best_device()
    cpu = f"{platform.machine()} CPU"
    where = f"{machine.describe(cpu)['device']}, torch {torch.__version__}"
    if device.type != "cpu":
        torch.set_float32_matmul_precision("high")
        where += ", fp32 with TF32 products"
    ways = list(WAYS)
    if reasons := device_reasons(device):
        print(f"without the kernels: {'; '.join(reasons)}")
        ways.remove("kernels")
    curves, failed = {}, False
    for precision in PRECISIONS:
        for way in ways:
            try:
                curve = losses(way, precision, options.steps)
            except (RuntimeError, ValueError) as error:
                # what the others learn is worth having all the same, beside the official curve
                failed = True
                print(f"{precision} {way:9}  failed: {error}", flush=True)
                if way == "official":
                    break
                continue
            curves[way, precision] = curve
            differences = (a - b for a, b in zip(curve, curves["official", precision], strict=True))
            print(
                f"{precision} {way:9}  loss of the last step {curve[-1]:.6f}, "
                f"at most {max(map(abs, differences)):.1e} from the official",
                flush=True,
            )
            save(curves, where, options.save)
    if curves:
        print(f"written: {options.save}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
