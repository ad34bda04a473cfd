"""The figures of one device's runs: what is faster, how near to the limit, at what memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks.operation import title

COLOURS = {
    "official": "#8c8c8c",
    "compiled": "#c9a227",
    "sdpa": "#5b8db8",
    "flex": "#7b5ea7",
    "catkernels": "#c1440e",
}
# the same file for the same runs
matplotlib.rcParams["svg.hashsalt"] = "catkernels"


def draw(rows: list[dict], folder: Path, device: str) -> None:
    """Draw every figure that the rows have data for.

    Args:
        rows: the `extra_info` of benchmarks, see `benchmarks.report.Device`.
        folder: where the figures go, as SVG.
        device: what the titles call the device.
    """
    swept, blocks = defaultdict(list), []
    for row in rows:
        if row["operation"] == "model" or row["void"]:
            continue
        if row["operation"] in ("ipsa", "cpsa"):
            swept[row["sweep"]].append(row)
        elif row["dtype"] != "autocast":
            # whose bars would stand in the place of bfloat16's
            blocks.append(row)
    figures = {
        **_all_bars("", swept["stages"] + swept["peers"]),
        **_all_bars("block_", blocks),
        "batch_size": _lines(swept["stages"], "images", lambda row: row["batch"]),
        "image_size": _lines(
            swept["stages"] + swept["image sizes"],
            "pixels of the map",
            lambda row: row["height"] * row["width"],
        ),
    }
    for name, figure in figures.items():
        if figure is not None:
            # all panels share their providers, or have some of them
            handles = dict(_handles(figure))
            figure.legend(
                handles.values(),
                handles,
                loc="outside lower center",
                ncols=len(handles),
                fontsize=8,
                frameon=False,
            )
            figure.suptitle(device, fontsize=10)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


Bars = dict[str, float]


def _all_bars(prefix: str, rows: list[dict]) -> dict[str, Figure | None]:
    """The figures with a bar for each stage and provider, by name."""
    return {
        f"{prefix}speedup": _bars(rows, "speed-up over the official operations", _speedup, 1.0),
        f"{prefix}roofline": _bars(rows, "% of the roofline", _share_of_roofline, 100.0),
        f"{prefix}memory": _bars(rows, "peak memory, MiB", _memory),
    }


def _speedup(row: dict) -> Bars:
    return {row["provider"]: row["speedup"]}


def _share_of_roofline(row: dict) -> Bars:
    return {
        "official": row["official_percent_of_roofline"],
        row["provider"]: row["percent_of_roofline"],
    }


def _memory(row: dict) -> Bars:
    if row["peak_mib"] is None:
        return {}
    return {"official": row["official_peak_mib"], row["provider"]: row["peak_mib"]}


def _bars(
    rows: list[dict], label: str, bars_of: Callable[[dict], Bars], line: float | None = None
) -> Figure | None:
    """Bars by stage and provider, one panel for each operation and direction."""
    rows = _of_one_batch([row for row in rows if row["name"].startswith("small")])
    panels: dict[tuple, dict[str, Bars]] = {}
    for row in rows:
        panel = panels.setdefault((row["operation"], row["direction"]), {})
        _, stage, *_ = row["name"].split("-")
        panel.setdefault(stage.replace("stage", "stage "), {}).update(bars_of(row))
    panels = {key: panel for key, panel in panels.items() if any(panel.values())}
    if not panels:
        return None
    figure, axes = _grid(panels)
    for (operation, direction), panel in panels.items():
        axis = axes[operation, direction]
        providers = [name for name in COLOURS if any(name in bars for bars in panel.values())]
        width = 0.8 / len(providers)
        for place, provider in enumerate(providers):
            heights = [bars.get(provider, 0.0) for bars in panel.values()]
            left = [stage + place * width for stage in range(len(panel))]
            axis.bar(left, heights, width, align="edge", color=COLOURS[provider], label=provider)
        axis.set_xticks([stage + 0.4 for stage in range(len(panel))], list(panel))
        axis.set_ylabel(label, fontsize=8)
        if line is not None:
            axis.axhline(line, color="black", linewidth=0.6, linestyle=":")
        batch, dtype = rows[0]["batch"], rows[0]["dtype"]
        axis.set_title(f"{title(operation)} {direction}, CAT-S, batch {batch}, {dtype}", fontsize=9)
    return figure


def _lines(rows: list[dict], label: str, x_of: Callable[[dict], int]) -> Figure | None:
    """Milliseconds an image of CAT-S' first stage, one panel for each attention and direction."""
    panels: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        if row["name"].startswith("small-stage1"):
            panels[row["operation"], row["direction"]].append(row)
    panels = {key: panel for key, panel in panels.items() if len(set(map(x_of, panel))) > 1}
    if not panels:
        return None
    figure, axes = _grid(panels)
    for (operation, direction), panel in panels.items():
        axis = axes[operation, direction]
        times = _times_an_image(panel, x_of)
        for provider, points in times.items():
            points = sorted(points.items())
            axis.plot(*zip(*points, strict=True), "o-", color=COLOURS[provider], label=provider)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(sorted(times["official"]))
        axis.minorticks_off()
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.tick_params(axis="x", labelsize=7, labelrotation=30)
        axis.set_xlabel(label, fontsize=8)
        axis.set_ylabel("ms an image", fontsize=8)
        axis.set_title(f"{title(operation)} {direction}, CAT-S stage 1", fontsize=9)
    return figure


def _times_an_image(rows: list[dict], x_of: Callable[[dict], int]) -> dict[str, dict[int, float]]:
    """By provider and x, milliseconds of the official operations over the provider's speed-up.

    Only speed-ups come from one alternation of rounds: a provider's own time would show how the
    machine's speed drifted from row to row as well. Of several batches at an x the largest counts.
    """
    batches: dict[int, int] = {}
    for row in rows:
        batches[x_of(row)] = max(row["batch"], batches.get(x_of(row), 0))
    rows = [row for row in rows if row["batch"] == batches[x_of(row)]]
    official: dict[int, float] = {}
    for row in rows:
        ms = row["official_ms"] / row["batch"]
        official[x_of(row)] = min(ms, official.get(x_of(row), ms))
    times = {"official": official}
    for row in rows:
        if row["provider"] != "official":
            ms = official[x_of(row)] / row["speedup"]
            times.setdefault(row["provider"], {})[x_of(row)] = ms
    return times


def _handles(figure: Figure) -> Iterator[tuple[str, Artist]]:
    """What the panels' labels name, in the order of `COLOURS`."""
    named = {}
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    yield from ((name, named[name]) for name in COLOURS if name in named)


def _of_one_batch(rows: list[dict]) -> list[dict]:
    """The rows of the largest batch."""
    batch = max((row["batch"] for row in rows), default=0)
    return [row for row in rows if row["batch"] == batch]


def _grid(panels: Iterable[tuple[str, str]]) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    """Panels in rows by operation and columns by direction."""
    operations = list(dict.fromkeys(operation for operation, _ in panels))
    directions = list(dict.fromkeys(direction for _, direction in panels))
    figure = Figure(figsize=(4.5 * len(directions), 3.2 * len(operations)), layout="constrained")
    axes = figure.subplots(len(operations), len(directions), squeeze=False)
    cells = {
        (operation, direction): axes[row][column]
        for row, operation in enumerate(operations)
        for column, direction in enumerate(directions)
    }
    for cell, axis in cells.items():
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_visible(cell in panels)
    return figure, cells
