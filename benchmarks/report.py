"""Render stored benchmark runs: the tables of benchmarks/README.md and each device's figures.

    python -m benchmarks.report [RUN.json ...]

Runs that are named are first filed under benchmarks/results/<device>/. Everything there is then
rendered: tables between the markers in benchmarks/README.md, figures beside the runs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import figures, predictions
from benchmarks.operation import title

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
MODELS = {"tiny": "CAT-T", "small": "CAT-S, CAT-B"}
MODES = ("latency", "inference", "replay", "training")


@dataclass(frozen=True)
class Device:
    """All runs of one device.

    Attributes:
        folder: where they are filed.
        about: the latest run's machine_info.
        date: of the latest run.
        rows: the `extra_info` of each benchmark, see `benchmarks.harness.race`.
    """

    folder: Path
    about: dict
    date: str
    rows: list[dict]

    @property
    def is_gpu(self) -> bool:
        return self.about["device_state"] != "one thread"


def load(folder: Path) -> Device:
    """The runs of one device; of a benchmark that was run several times the latest counts.

    Raises:
        ValueError: a run is a trial, whose figures mean nothing, or is of another device.
    """
    runs = [read(path) for path in (*folder.glob("*.json"), *folder.glob("*.jsonl"))]
    runs.sort(key=lambda run: run["datetime"])
    about = runs[-1]["machine_info"]
    for run in runs:
        if slug(run["machine_info"]["device"]) != folder.name:
            raise ValueError(f"{folder} holds a run on {run['machine_info']['device']}: move it")
    latest = {
        benchmark["fullname"]: benchmark["extra_info"]
        for run in runs
        for benchmark in run["benchmarks"]
    }
    return Device(folder, about, runs[-1]["datetime"][:10], list(latest.values()))


def read(path: Path) -> dict:
    """A run as pytest-benchmark stored it, or as `benchmarks.first` did, in lines.

    Raises:
        ValueError: it is none, or a trial.
    """
    if path.suffix == ".jsonl":
        about, *lines = map(json.loads, path.read_text().splitlines())
        run = about | {"benchmarks": _as_benchmarks(lines)}
    else:
        run = json.loads(path.read_text())
    about = run.get("machine_info", {})
    if "benchmarks" not in run or "device_state" not in about:
        raise ValueError(
            f"{path} is no run of these benchmarks: give a --benchmark-json file, or first.jsonl"
        )
    if about["trial"]:
        raise ValueError(f"{path} is a trial, whose figures mean nothing: run without --trial")
    return run


def _as_benchmarks(lines: list[dict]) -> list[dict]:
    """The timed rows of lines, those of launches that do not ship among them."""
    return [
        {"fullname": line["key"], "extra_info": row} for line in lines for row in timed_rows([line])
    ]


def timed_rows(lines: list[dict]) -> list[dict]:
    """The rows with a time in lines of `benchmarks.first`."""
    rows = (row for line in lines for row in line.get("rows", ()))
    return [row for row in rows if "speedup" in row]


def slug(device: str) -> str:
    """A device's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower().replace("(r)", "")).strip("-")


def tables(device: Device) -> Iterator[str]:
    """The device's tables as lines of Markdown."""
    versions = ", ".join(
        f"{name} {device.about[name]}"
        for name in ("torch", "triton", "ptxas", "cuda")
        if device.about.get(name)
    )
    where = device.about["device"] + ("" if device.is_gpu else ", one thread")
    yield f"**{where}** ({versions}; {device.date})"
    yield ""
    yield from _operation_table(device.rows)
    yield from _model_table(device.rows)
    if device.is_gpu:
        yield "Predicted without a GPU (GPU.md), and measured:"
        yield ""
        yield from predictions.beside(device.rows)
        yield ""
    links = (
        f"[{picture.stem.replace('_', ' ')}]({picture.relative_to(ROOT)})"
        for picture in sorted(device.folder.glob("*.svg"))
    )
    yield f"Figures: {', '.join(links)}."


def _operation_table(rows: list[dict]) -> Iterator[str]:
    """This package's rows of the sweeps over the models' stages, a stage in each column."""
    lines: dict[tuple, dict[str, str]] = {}
    for row in rows:
        if row.get("sweep") == "stages" and row["provider"] == "catkernels":
            model, stage, *_ = row["name"].split("-")
            key = (title(row["operation"]), MODELS[model], row["batch"], row["dtype"])
            peer = best_peer(row, rows)
            lines.setdefault((*key, row["direction"]), {})[stage] = _cell(row, peer)
    if not lines:
        return
    yield "| operation | model | batch | dtype | pass | stage 1 | stage 2 | stage 3 | stage 4 |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for key, cells in lines.items():
        stages = [cells.get(f"stage{stage}", "") for stage in range(1, 5)]
        yield f"| {' | '.join([*map(str, key), *stages])} |"
    yield ""


def _model_table(rows: list[dict]) -> Iterator[str]:
    """Every provider's row of whole models."""
    models = [row for row in rows if row["operation"] == "model"]
    if not models:
        return
    yield "| model | run | batch | dtype | provider | official | the provider |"
    yield "|---|---|---|---|---|---|---|"
    for row in sorted(models, key=lambda row: MODES.index(row["direction"])):
        key = (row[name] for name in ("name", "direction", "batch", "dtype", "provider"))
        yield f"| {' | '.join(map(str, key))} | {row['official_ms']:.3g} ms | {_cell(row)} |"
    yield ""


def best_peer(row: dict, rows: list[dict]) -> dict | None:
    """Of the other providers' rows of the same case the one with the largest speed-up, if any."""
    case = ("operation", "name", "dtype", "direction")
    peers = [
        other
        for other in rows
        if other["provider"] not in ("official", "candidate", row["provider"])
        and all(other[key] == row[key] for key in case)
    ]
    return max(peers, key=lambda peer: peer["speedup"], default=None)


def _cell(row: dict, peer: dict | None = None) -> str:
    """A time and its speed-up over the official operations of the same rounds, and a peer's."""
    beside = ""
    if peer is not None:
        beside = f" ({peer['provider']} {peer['speedup']:.2f}x{_noisy(peer)})"
    share = f", {row['percent_of_roofline']:.0f} %" if row["operation"] != "model" else ""
    note = ", reference" if row.get("served_by", "").startswith("reference") else ""
    time = f"{row['contender_ms']:.3g} ms, {row['speedup']:.2f}x"
    return f"{time}{beside}{share}{note}{_noisy(row)}"


def _noisy(row: dict) -> str:
    return " \\*" if row["void"] else ""


def render(devices: list[Device]) -> str:
    """What stands between the markers of benchmarks/README.md."""
    lines = [
        "Each cell has this package's time and its speed-up over the official operations, timed",
        "in turn with it. But for models the fastest peer's speed-up stands in brackets: `sdpa` is",
        "`torch.nn.functional.scaled_dot_product_attention` on partitioned tensors, `compiled` the",
        "official operations through `torch.compile`, `flex` FlexAttention. Then comes this",
        "package's share of the roofline: the least bytes and products at the device's measured",
        "speed of copying and multiplying.",
        "",
    ]
    for device in devices:
        lines += [*tables(device), ""]
    if any(row["void"] for device in devices for row in device.rows):
        lines += [
            "\\* void, a noisy moment: the official operations, timed twice, differed from",
            "themselves by more than a tenth.",
            "",
        ]
    if not any(device.is_gpu for device in devices):
        lines.append("**Not measured yet:** any time on a GPU.")
    return "\n".join(lines).rstrip()


def insert(text: str, rendered: str) -> str:
    """``text`` with what stands between its markers replaced.

    Raises:
        ValueError: it does not have each marker once, in this order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"benchmarks/README.md needs one {BEGIN} and one {END} after it")
    return f"{before}{BEGIN}\n{rendered}\n{END}{after}"


def file(paths: list[Path], results: Path = RESULTS) -> None:
    """Copy runs to their devices' folders; none is copied where one is refused.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is no run of these benchmarks, or a trial.
    """
    runs = {path: read(path) for path in paths}
    for path, run in runs.items():
        folder = results / slug(run["machine_info"]["device"])
        folder.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jsonl":
            (folder / path.name).write_text(path.read_text())
            continue
        # what a machine calls itself says nothing about its figures
        for name in ("node", "release"):
            run["machine_info"].pop(name, None)
        (folder / path.name).write_text(json.dumps(run, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "runs", nargs="*", type=Path, help="files of --benchmark-json, or first.jsonl"
    )
    try:
        file(parser.parse_args().runs)
        folders = sorted({path.parent for path in RESULTS.glob("*/*.json*")})
        devices = [load(folder) for folder in folders]
        for device in devices:
            shipped = [row for row in device.rows if row["provider"] != "candidate"]
            figures.draw(shipped, device.folder, device.about["device"])
        README.write_text(insert(README.read_text(), render(devices)))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
