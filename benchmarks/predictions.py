"""What was predicted of each kernel without a GPU, and what a GPU makes of it.

The predictions are a table in GPU.md, made before anything had run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.operation import title

TABLE = Path(__file__).parent / "GPU.md"
# | CPSA forward | 2 | 61-69 | 74-84 |
ROW = re.compile(r"\| ([A-Za-z ]+) (forward|backward) \| (\d) \| ([\d-]+) \| ([\d-]+) \|")


@dataclass(frozen=True)
class Prediction:
    """Of one operation, pass and stage, at batch 256 in bfloat16: as text, "61-69"."""

    us: str
    percent: str  # of the roofline


def predictions() -> dict[tuple[str, str, int], Prediction]:
    """By operation as tables call it ("IPSA"), pass and stage."""
    return {
        (operation, direction, int(stage)): Prediction(us, percent)
        for operation, direction, stage, us, percent in ROW.findall(TABLE.read_text())
    }


def beside(rows: list[dict]) -> Iterator[str]:
    """A table of Markdown: each prediction, what was measured, and the fastest launch of all.

    Args:
        rows: of `benchmarks.first`, see `benchmarks.harness.race`.
    """
    measured: dict[tuple[str, str, int], list[dict]] = {}
    for row in rows:
        stage = re.match(r"small-stage(\d)-.*-b256$", row.get("name", ""))
        is_ours = row["provider"] in ("catkernels", "candidate")
        if stage and is_ours and row["dtype"] == "bfloat16":
            key = (title(row["operation"]), row["direction"], int(stage[1]))
            measured.setdefault(key, []).append(row)
    yield "| | stage | predicted us | measured | predicted % | measured | fastest launch |"
    yield "|---|---|---|---|---|---|---|"
    for key, prediction in predictions().items():
        operation, direction, stage = key
        ours = [row for row in measured.get(key, ()) if row["provider"] == "catkernels"]
        us = percent = fastest = "not yet"
        if ours:
            us = f"{1e3 * ours[-1]['contender_ms']:.0f}"
            percent = f"{ours[-1]['percent_of_roofline']:.0f}"
            best = min(measured[key], key=lambda row: row["contender_ms"])
            fastest = f"{best.get('launch', 'shipped')}, {1e3 * best['contender_ms']:.0f}"
        cells = (stage, prediction.us, us, prediction.percent, percent, fastest)
        yield f"| {operation} {direction} | {' | '.join(map(str, cells))} |"
