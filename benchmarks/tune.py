"""Time the candidates of every launch table, in turn, and print the rows to ship.

    python -m benchmarks.tune OUT.json [--trial] [--time-limit SECONDS]

A candidate is the shipped launch with other numbers of warps and stages. It must compile, fit the
device and give right results; else it is listed without a time, with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import pkgutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from benchmarks import harness, machine
from benchmarks.attention import (
    Attention,
    make_leaves,
    official_results,
    results,
    workload,
)
from benchmarks.bench_cpsa import CPSA
from benchmarks.bench_cpsa import catkernels_provider as cpsa_provider
from benchmarks.bench_ipsa import IPSA
from benchmarks.bench_ipsa import catkernels_provider as ipsa_provider
from benchmarks.clock import CLOCK
from catkernels.testing import Shape, cat_stages


@dataclass(frozen=True)
class Effort:
    """How much is tried: numbers of warps, each with every number of stages, so many times."""

    num_warps: tuple[int, ...] = (2, 4, 8, 16)
    num_stages: tuple[int, ...] = (1, 2, 3)
    rounds: int = 15


# Enough to see that all of it runs, one patch size and number of patches for each of the tables.
TRIAL = Effort(num_warps=(4, 8), num_stages=(1,), rounds=1)
TRIAL_SHAPES = (
    Shape("few patches", batch=1, height=14, width=7, channels=16, num_heads=1),
    Shape("many patches", batch=1, height=9, width=9, channels=16, num_heads=1, patch_size=1),
)


@dataclass(frozen=True)
class Table:
    """Where the launchers look one launch up.

    Attributes:
        attention: whose launch it is.
        direction: the pass in which it is looked up, "forward" or "backward".
        owner: the module or class that the launchers find it in, as `pkgutil.resolve_name` has it.
        name: the function or property there; it gives a launch or a tuple of them.
    """

    attention: Attention
    direction: str
    owner: str
    name: str

    def __str__(self) -> str:
        return f"{self.owner.removeprefix('catkernels.kernels.')}.{self.name}"

    @contextlib.contextmanager
    def answering(self, answer: Callable) -> Iterator[None]:
        """Let ``answer`` turn what is looked up into what is launched."""
        owner = pkgutil.resolve_name(self.owner)
        shipped = vars(owner)[self.name]
        if isinstance(shipped, property):
            replacement = property(lambda problem: answer(shipped.fget(problem)))
        else:

            def replacement(*arguments, **options):
                return answer(shipped(*arguments, **options))

        with mock.patch.object(owner, self.name, replacement):
            yield


KERNELS = "catkernels.kernels."
TABLES = (
    Table(IPSA, "forward", KERNELS + "ipsa_launch:Problem", "forward_launch"),
    Table(IPSA, "backward", KERNELS + "ipsa_launch:Problem", "backward_launch"),
    Table(CPSA, "forward", KERNELS + "cpsa_forward", "forward_launch"),
    Table(CPSA, "forward", KERNELS + "cpsa_flash", "flash_forward_launch"),
    Table(CPSA, "backward", KERNELS + "cpsa_backward", "backward_passes"),
    Table(CPSA, "backward", KERNELS + "cpsa_flash_backward", "flash_backward_launch"),
    Table(CPSA, "backward", KERNELS + "cpsa_flash_backward", "flash_weights_launch"),
)
PROVIDERS = {
    IPSA: functools.partial(ipsa_provider, backend="triton"),
    CPSA: functools.partial(cpsa_provider, backend="triton"),
}


def tune(table: Table, shape: Shape, dtype: torch.dtype, effort: Effort) -> dict | None:
    """Time a table's candidates on one shape; None where the shape does not come to the table.

    Returns:
        The shipped launch, and of each candidate its ``ms`` or why it has none.
    """
    inputs = make_leaves(table.attention, shape, dtype)
    attend = PROVIDERS[table.attention](shape, inputs)
    shipped = _looked_up(table, lambda: workload(table.direction, attend, inputs)())
    if shipped is None:
        return None
    runs, failures = {}, {}
    for launch in _candidates(shipped, effort):
        with table.answering(lambda _, launch=launch: launch):
            try:
                _judge(table, shape, dtype, results(attend, inputs, True))
                runs[launch], _ = harness.captured(workload(table.direction, attend, inputs))
            except Exception as error:
                # whatever a compiler or driver raises, it only means that the candidate is out
                failures[launch] = f"{type(error).__name__}: {str(error)[:200]}"
    times_ms = _times_in_turn(table, runs, effort.rounds)
    return {
        "table": str(table),
        "shape": str(shape),
        "dtype": str(dtype),
        "shipped": repr(shipped),
        "shipped_ms": times_ms.get(shipped),
        "candidates_ms": {repr(launch): ms for launch, ms in times_ms.items()},
        "failures": {repr(launch): reason for launch, reason in failures.items()},
    }


def _looked_up(table: Table, run: Callable[[], object]):
    """What the launchers find in the table in the course of ``run``."""
    found = []

    def remember(launch):
        found.append(launch)
        return launch

    with table.answering(remember):
        run()
    return found[-1] if found else None


def _candidates(shipped, effort: Effort) -> list:
    """The shipped launch, or tuple of launches, first; then all others, each once."""
    variants = itertools.product(effort.num_warps, effort.num_stages)
    return list(dict.fromkeys([shipped, *(_vary(shipped, *variant) for variant in variants)]))


def _vary(launch, num_warps: int, num_stages: int):
    if isinstance(launch, tuple):
        return tuple(_vary(part, num_warps, num_stages) for part in launch)
    fields = {field.name for field in dataclasses.fields(launch)}
    wanted = {"num_warps": num_warps, "num_stages": num_stages}
    return dataclasses.replace(launch, **{k: v for k, v in wanted.items() if k in fields})


def _judge(table: Table, shape: Shape, dtype: torch.dtype, contender: dict) -> None:
    official, truth = (
        official_results(table.attention, shape, dtype, computed_in, True)
        for computed_in in (dtype, torch.float64)
    )
    harness.judge(contender, official, truth)


def _times_in_turn(table: Table, runs: dict, rounds: int) -> dict:
    """Milliseconds of each candidate, all of them in turn in each round, fastest first."""
    times = {launch: [] for launch in runs}
    for _ in range(rounds):
        for launch, run in runs.items():
            with table.answering(lambda _, launch=launch: launch):
                harness.flush_cache()
                start = CLOCK()
                run()
                times[launch].append(CLOCK() - start)
    typical_ms = {launch: 1e3 * harness.typical(seconds) for launch, seconds in times.items()}
    return dict(sorted(typical_ms.items(), key=lambda item: item[1]))


def _problems(trial: bool) -> Iterator[tuple[Table, Shape, torch.dtype]]:
    """Every table on CAT-S' stages and a large map, the dtype of most models first."""
    if trial:
        yield from itertools.product(TABLES, TRIAL_SHAPES, (torch.float32,))
        return
    shapes = [*cat_stages("small", batch=256), cat_stages("small", 512, batch=8)[0]]
    for dtype in (torch.bfloat16, torch.float32):
        yield from ((table, shape, dtype) for table in TABLES for shape in shapes)


def _print(row: dict) -> None:
    print(f"\n{row['table']}  {row['shape']}  {row['dtype']}")
    for launch, ms in row["candidates_ms"].items():
        note = "  shipped" if launch == row["shipped"] else ""
        print(f"  {ms:8.4f} ms  {launch}{note}")
    for launch, reason in row["failures"].items():
        print(f"  no number  {launch}: {reason}")
    print(f"  to ship: {next(iter(row['candidates_ms']), 'none works')}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("--trial", action="store_true", help="one small shape")
    parser.add_argument("--time-limit", type=float, default=float("inf"), metavar="SECONDS")
    arguments = parser.parse_args()

    effort = TRIAL if arguments.trial else Effort()
    end = time.monotonic() + arguments.time_limit
    rows, left = [], []
    with harness.own_stream():
        for problem in _problems(arguments.trial):
            if time.monotonic() > end:
                left.append(" ".join(map(str, problem)))
            elif row := tune(*problem, effort):
                rows.append(row)
                _print(row)
    about = machine.describe("CPU") | {"trial": arguments.trial}
    content = {"machine_info": about, "launches": rows, "out_of_time": left}
    arguments.output.write_text(json.dumps(content, indent=1))
    for problem in left:
        print(f"not tuned, out of time: {problem}")
    broken = [row for row in rows if row["shipped_ms"] is None]
    for row in broken:
        print(f"the shipped launch fails: {row['table']} {row['shape']} {row['dtype']}")
    if not rows:
        print("no launch was looked up: nothing was tuned")
    return 1 if left or broken or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
