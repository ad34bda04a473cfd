"""Time the candidates of every launch table, in turn, and print the rows to ship.

    python -m benchmarks.tune OUT.json [--trial] [--time-limit SECONDS]

A candidate is the shipped launch with other numbers of warps and stages. It must compile, fit the
device and give right results; else it is listed without a time, with the reason.

OUT.json is written after each table and shape. One that exists already, of the same device and
versions, is gone on with: name another where the launch tables have changed since.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import harness
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
from catkernels import machine
from catkernels.cases import Shape, cat_stages


@dataclass(frozen=True)
class Effort:
    """How much is tried: numbers of warps, each with every number of stages, so many times.

    Two warps come first: some versions of ptxas compile Hopper's products of a transposed result,
    as IPSA's backward pass has them, wrongly for four.
    """

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
    """A table in which the launchers look one launch up.

    Attributes:
        attention: whose launch it is.
        direction: the pass in which it is looked up, "forward" or "backward".
        name: of the function, with its module, below ``catkernels.kernels``.
    """

    attention: Attention
    direction: str
    name: str

    def __str__(self) -> str:
        return self.name

    @contextlib.contextmanager
    def answering(self, answer: Callable) -> Iterator[None]:
        """Let ``answer`` turn what is looked up into what is launched."""
        # imported late, so that the benchmarks load where Triton is missing
        from catkernels.kernels.launch import overriding

        def replace(table, problem, shipped):
            is_this = f"{table.__module__}.{table.__name__}" == f"catkernels.kernels.{self.name}"
            return answer(shipped) if is_this else shipped

        with overriding(replace):
            yield


TABLES = (
    Table(IPSA, "forward", "ipsa.launch.forward_launch"),
    Table(IPSA, "backward", "ipsa.launch.backward_launch"),
    Table(CPSA, "forward", "cpsa.launch.forward_launch"),
    Table(CPSA, "forward", "cpsa.launch.flash_forward_launch"),
    Table(CPSA, "backward", "cpsa.launch.backward_passes"),
    Table(CPSA, "backward", "cpsa.launch.flash_backward_launch"),
    Table(CPSA, "backward", "cpsa.launch.flash_weights_launch"),
)
# What is computed with, by name: the dtype, and torch's setting for products of float32.
PRECISIONS = {
    "bfloat16": (torch.bfloat16, "highest"),
    "tf32": (torch.float32, "high"),
    "float32": (torch.float32, "highest"),
}
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
    if not _served(table, shape, inputs):
        return None
    shipped, failure = _looked_up(table, lambda: workload(table.direction, attend, inputs)())
    if shipped is None and failure is None:
        return None
    runs, failures = {}, {shipped: failure} if failure else {}
    for launch in _candidates(shipped, effort) if shipped else ():
        with table.answering(lambda _, launch=launch: launch):
            try:
                _judge(table, shape, dtype, attend, inputs)
                runs[launch], _ = harness.captured(workload(table.direction, attend, inputs))
            except Exception as error:
                # whatever a compiler or driver raises, it only means that the candidate is out
                failures[launch] = _described(error)
    return _result(shipped, _times_in_turn(table, runs, effort.rounds), failures)


def _result(shipped: object | None, times_ms: dict, failures: dict) -> dict:
    return {
        "shipped": repr(shipped),
        "shipped_ms": times_ms.get(shipped),
        "candidates_ms": {repr(launch): ms for launch, ms in times_ms.items()},
        "failures": {repr(launch): reason for launch, reason in failures.items()},
    }


def _served(table: Table, shape: Shape, inputs: dict[str, torch.Tensor]) -> bool:
    """Whether the kernels serve this direction: of exact float32, a GPU's do not all."""
    with torch.inference_mode(table.direction == "forward"):
        return table.attention.served_by(shape, inputs) == "triton"


def _looked_up(table: Table, run: Callable[[], object]) -> tuple[object | None, str | None]:
    """What the launchers find in the table in the course of ``run``, and why that failed if so."""
    found, failure = [], None

    def remember(launch):
        found.append(launch)
        return launch

    with table.answering(remember):
        try:
            run()
        except Exception as error:
            failure = _described(error)
    return found[-1] if found else None, failure


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


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


def _judge(
    table: Table,
    shape: Shape,
    dtype: torch.dtype,
    attend: Callable[[], torch.Tensor],
    inputs: dict[str, torch.Tensor],
) -> None:
    with_gradients = table.direction == "backward"
    official, truth = (
        official_results(table.attention, shape, dtype, computed_in, with_gradients)
        for computed_in in (dtype, torch.float64)
    )
    harness.judge(results(attend, inputs, with_gradients), official, truth)


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


def _problems(trial: bool) -> Iterator[tuple[Table, Shape, str]]:
    """Every table on CAT-S' stages and a large map, what matters to most models first."""
    if trial:
        yield from itertools.product(TABLES, TRIAL_SHAPES, ("tf32",))
        return
    shapes = [*cat_stages("small", batch=256), cat_stages("small", 512, batch=8)[0]]
    for precision in PRECISIONS:
        yield from ((table, shape, precision) for shape in shapes for table in TABLES)


@contextlib.contextmanager
def _computing_in(precision: str) -> Iterator[torch.dtype]:
    dtype, setting = PRECISIONS[precision]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    # the official results of the same dtype are others
    official_results.cache_clear()
    try:
        yield dtype
    finally:
        torch.set_float32_matmul_precision(before)
        official_results.cache_clear()


@dataclass(frozen=True)
class Record:
    """What a run has found, in a file: ``launches``, each with the ``problem`` it is of."""

    path: Path
    about: dict
    rows: list[dict]

    @classmethod
    def of(cls, path: Path, about: dict) -> Record:
        """With the rows that the file has already, where they are of the same device and versions.

        Raises:
            ValueError: the file is no record.
        """
        rows = []
        if path.exists():
            stored = json.loads(path.read_text())
            if not isinstance(stored, dict) or not {"machine_info", "launches"} <= stored.keys():
                raise ValueError(f"{path} is no file of this program: name another")
            # the state has the clocks, which are never the same
            identity = about.keys() - {"device_state"}
            if all(stored["machine_info"].get(name) == about[name] for name in identity):
                rows = stored["launches"]
        return cls(path, about, rows)

    def holds(self, problem: str) -> bool:
        return any(row["problem"] == problem for row in self.rows)

    def add(self, row: dict) -> None:
        """Write it as well, at once and whole, so that nothing is lost with what comes after."""
        self.rows.append(row)
        content = {"machine_info": self.about, "launches": self.rows}
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(content, indent=1))
        unfinished.replace(self.path)


def _print(row: dict) -> None:
    print(f"\n{row['problem']}")
    for launch, ms in row["candidates_ms"].items():
        note = "  shipped" if launch == row["shipped"] else ""
        print(f"  {ms:8.4f} ms  {launch}{note}")
    for launch, reason in row["failures"].items():
        print(f"  no number  {launch}: {reason}")
    print(f"  to ship: {next(iter(row['candidates_ms']), 'none works')}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path, help="JSON file to write, or to go on with")
    parser.add_argument("--trial", action="store_true", help="one small shape")
    parser.add_argument("--time-limit", type=float, default=float("inf"), metavar="SECONDS")
    arguments = parser.parse_args()

    effort = TRIAL if arguments.trial else Effort()
    end = time.monotonic() + arguments.time_limit
    record = Record.of(arguments.output, machine.describe() | {"trial": arguments.trial})
    left = []
    with harness.own_stream():
        for table, shape, precision in _problems(arguments.trial):
            problem = f"{table} {shape} {precision}"
            if record.holds(problem):
                continue
            if time.monotonic() > end:
                left.append(problem)
                continue
            try:
                with _computing_in(precision) as dtype:
                    found = tune(table, shape, dtype, effort)
            except Exception as error:
                # a launch that breaks the device breaks all others of this process: the next run
                # leaves it out
                record.add({"problem": problem} | _result(None, {}, {None: _described(error)}))
                raise
            if found:
                record.add({"problem": problem} | found)
                _print(record.rows[-1])
    if left:
        print(f"out of time, run again to go on with: {'; '.join(left)}")
    broken = [row["problem"] for row in record.rows if row["shipped_ms"] is None]
    for problem in broken:
        print(f"the shipped launch fails: {problem}")
    if not record.rows:
        print("no launch was looked up: nothing was tuned")
    return 1 if left or broken or not record.rows else 0


if __name__ == "__main__":
    sys.exit(main())
