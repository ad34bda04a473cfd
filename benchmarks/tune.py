"""Time the candidates of every launch table, in turn, and print the rows to ship.

    python -m benchmarks.tune OUT.json [--trial] [--time-limit SECONDS]

A candidate is the shipped launch with a plausible change: of stages, warps, programs, or channels
of a tile (`benchmarks.candidates`). All are compiled in a pool of processes before anything is
timed. A candidate must compile, fit the device and give right results; else it is listed without a
time, with the reason.

OUT.json is written after each table and shape. One that exists already, of the same device and
versions, is gone on with: name another where the launch tables have changed since.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import harness, operation
from benchmarks.bench_cpsa import CPSA
from benchmarks.bench_cpsa import catkernels_provider as cpsa_provider
from benchmarks.bench_ipsa import IPSA
from benchmarks.bench_ipsa import catkernels_provider as ipsa_provider
from benchmarks.candidates import Candidate, candidates, compile_candidate, looked_up
from benchmarks.clock import CLOCK, DEVICE
from catkernels import machine
from catkernels.cases import CPSACase, IPSACase, Shape, cat_stages
from catkernels.families import Case, Task, products
from catkernels.pool import num_cores, run_apart
from catkernels.torch_state.device import interpreting

ROUNDS = 15
# What is computed with, by name: the dtype, and whether torch's setting is TF32 for float32.
PRECISIONS = {
    "bfloat16": (torch.bfloat16, False),
    "tf32": (torch.float32, True),
    "float32": (torch.float32, False),
}
PROVIDERS = {
    IPSA: functools.partial(ipsa_provider, backend="triton"),
    CPSA: functools.partial(cpsa_provider, backend="triton"),
}
# Enough to see that all of it runs, one patch size and number of patches for each of the tables.
TRIAL_SHAPES = (
    Shape("few patches", batch=1, height=14, width=7, channels=16, num_heads=1),
    Shape("many patches", batch=1, height=9, width=9, channels=16, num_heads=1, patch_size=1),
)
# As many images have the same kernels as a large batch, and are soon made.
COMPILED_IMAGES = 16


@dataclass(frozen=True)
class Problem:
    """What a launch is looked up for."""

    attention: operation.Operation
    direction: str  # "forward" or "backward"
    shape: Shape
    precision: str

    def __str__(self) -> str:
        return f"{self.attention.name} {self.direction} {self.shape} {self.precision}"

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision][0]

    @property
    def tf32(self) -> bool:
        return PRECISIONS[self.precision][1]

    def task(self, target: object) -> Task:
        """Its kernels, to be compiled for ``target``."""
        return Task(str(self), (self._case(),), self.dtype, self.tf32, DEVICE.type, target)

    def _case(self) -> Case:
        shape = self.shape
        sizes = (shape.name, min(shape.batch, COMPILED_IMAGES), shape.height, shape.width)
        if self.attention is CPSA:
            return CPSACase(*sizes, shape.channels, patch_size=shape.patch_size)
        head_dim = shape.channels // shape.num_heads
        options = {"num_heads": shape.num_heads, "head_dim": head_dim, "without": ("qkv_bias",)}
        return IPSACase(*sizes, patch_size=shape.patch_size, **options)

    def tables(self, target: object) -> dict[str, object]:
        """What ships, by table: the tables of this direction alone, none where it is not served."""
        task = self.task(target)
        if not all(differentiate for _, differentiate in task.passes()):
            return {} if self.direction == "backward" else looked_up(replace(task, forward=True))
        forward = looked_up(replace(task, forward=True))
        if self.direction == "forward":
            return forward
        return {t: launch for t, launch in looked_up(task).items() if t not in forward}


def problems(trial: bool) -> Iterator[Problem]:
    """CAT-S' stages and a large map, what matters to most models first."""
    shapes = [*cat_stages("small", batch=256), cat_stages("small", 512, batch=8)[0]]
    for precision in ("tf32",) if trial else PRECISIONS:
        for shape in TRIAL_SHAPES if trial else shapes:
            for attention in (IPSA, CPSA):
                for direction in ("forward", "backward"):
                    yield Problem(attention, direction, shape, precision)


def compile_all(
    pairs: list[tuple[Problem, Candidate]], target: object
) -> dict[tuple[Problem, Candidate], str]:
    """Compile launches in a pool; returns those that fail, and how."""
    if interpreting():
        return {}
    tasks = [(problem.task(target), candidate) for problem, candidate in pairs]
    environment = {"OMP_NUM_THREADS": "1"}
    done = run_apart(compile_candidate, tasks, workers=num_cores(), environment=environment)
    failed = [outcome for outcome in done if outcome.failure]
    return {pairs[tasks.index(outcome.task)]: outcome.failure for outcome in failed}


def tune(problem: Problem, trials: list[Candidate], failures: dict, rounds: int) -> dict:
    """Time candidates on one problem, what ships first, and say why some have no number.

    Returns:
        The table, the shipped launch, and of each candidate its ``ms`` or why it has none.
    """
    with _computing_in(problem):
        inputs = operation.make_leaves(problem.attention, problem.shape, problem.dtype)
        attend = PROVIDERS[problem.attention](problem.shape, inputs)
        runs, reasons = {}, {c: failures[problem, c] for c in trials if (problem, c) in failures}
        for candidate in trials:
            if candidate in reasons:
                continue
            with candidate.launched():
                try:
                    _judge(problem, attend, inputs)
                    run = operation.workload(problem.direction, attend, inputs)
                    runs[candidate], _ = harness.captured(run)
                except Exception as error:
                    # whatever a compiler or driver raises, it only means that it is out
                    reasons[candidate] = _described(error)
        return _result(trials[0], times_in_turn(runs, rounds), reasons)


def _result(shipped: Candidate, times_ms: dict, failures: dict) -> dict:
    return {
        "table": shipped.table,
        "shipped_ms": times_ms.get(shipped),
        "candidates_ms": {str(candidate): ms for candidate, ms in times_ms.items()},
        "failures": {str(candidate): reason for candidate, reason in failures.items()},
    }


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


def _judge(problem: Problem, attend: Callable[[], torch.Tensor], inputs: dict) -> None:
    dtype = str(problem.dtype).removeprefix("torch.")
    case = operation.Case("", problem.shape, dtype, problem.direction)
    official, truth = (
        operation.official_results(problem.attention, case, computed_in)
        for computed_in in (problem.dtype, torch.float64)
    )
    harness.judge(operation.results(attend, inputs, case.with_gradients), official, truth)


def times_in_turn(runs: dict[Candidate, Callable], rounds: int) -> dict[Candidate, float]:
    """Milliseconds of each candidate, all of them in turn in each round, fastest first."""
    times = {candidate: [] for candidate in runs}
    for _ in range(rounds):
        for candidate, run in runs.items():
            with candidate.launched():
                harness.flush_cache()
                start = CLOCK()
                run()
                times[candidate].append(CLOCK() - start)
    typical_ms = {candidate: 1e3 * harness.typical(seconds) for candidate, seconds in times.items()}
    return dict(sorted(typical_ms.items(), key=lambda item: item[1]))


@contextlib.contextmanager
def _computing_in(problem: Problem) -> Iterator[None]:
    # the official results of the same dtype are others
    operation.official_results.cache_clear()
    with products(problem.tf32):
        yield
    operation.official_results.cache_clear()


@dataclass(frozen=True)
class Launches:
    """What a run has found, in a file: ``launches``, each with the ``problem`` it is of."""

    path: Path
    about: dict
    rows: list[dict]

    @classmethod
    def of(cls, path: Path, about: dict) -> Launches:
        """With the rows that the file has already, where they are of the same device and versions.

        Raises:
            ValueError: the file is no record.
        """
        rows = []
        if path.exists():
            stored = json.loads(path.read_text())
            if not isinstance(stored, dict) or not {"machine_info", "launches"} <= stored.keys():
                raise ValueError(f"{path} is no file of this program: name another")
            if machine.is_same(stored["machine_info"], about):
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
        print(f"  {ms:8.4f} ms  {launch}")
    for launch, reason in row["failures"].items():
        print(f"  no number  {launch}: {reason}")
    print(f"  to ship: {next(iter(row['candidates_ms']), 'none works')}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path, help="JSON file to write, or to go on with")
    parser.add_argument("--trial", action="store_true", help="one small shape")
    parser.add_argument("--time-limit", type=float, default=float("inf"), metavar="SECONDS")
    arguments = parser.parse_args()

    end = time.monotonic() + arguments.time_limit
    record = Launches.of(arguments.output, machine.describe() | {"trial": arguments.trial})
    target = None
    if not interpreting():
        from catkernels.kernels.compile_ahead import current_target

        target = current_target()
    trials = {
        (problem, table): candidates(table, shipped)[: 2 if arguments.trial else None]
        for problem in problems(arguments.trial)
        for table, shipped in problem.tables(target).items()
        if not record.holds(f"{problem} {table}")
    }
    failures = compile_all([(p, c) for (p, _), tried in trials.items() for c in tried], target)
    left = []
    with harness.own_stream():
        for (problem, table), tried in trials.items():
            name = f"{problem} {table}"
            if time.monotonic() > end:
                left.append(name)
                continue
            try:
                found = tune(problem, tried, failures, 1 if arguments.trial else ROUNDS)
            except Exception as error:
                # a launch that breaks the device breaks all others of this process: the next run
                # leaves it out
                record.add({"problem": name} | _result(tried[0], {}, {tried[0]: _described(error)}))
                raise
            record.add({"problem": name} | found)
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
