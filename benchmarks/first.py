"""What is true on a GPU that nothing here has run on yet, in at most five minutes.

    python -m benchmarks.first OUT.jsonl [--trial] [--time-limit SECONDS]

In this order, so that what is cut off is what matters least: every kernel compiled in a pool; the
self-check against float64; the device's ceilings; bits over 200 launches, and of one stage against
several; both attentions at every stage of CAT-S, with the launches that a prediction left open; the
whole model; one image, with and without a CUDA graph; blocks and their parts, as far as they were
predicted; peers that have to be compiled.

Each result is a line of JSON, written as it comes. A run that was cut off is gone on with: what
succeeded is not done again. What is timed runs in a process of its own; where that one crashes, the
row is lost and another process goes on. A wrong result is never timed.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch

from benchmarks import bench_model, harness, operation, prebuild, predictions, report, roofline
from benchmarks.bench_block import BLOCKS, PARTS
from benchmarks.bench_cpsa import CPSA
from benchmarks.bench_ipsa import IPSA
from benchmarks.candidates import Candidate
from benchmarks.clock import DEVICE
from catkernels import families, machine
from catkernels.block_cases import MLPCase
from catkernels.cases import CPSACase, IPSACase, cat_stages, random_grad
from catkernels.commands import check
from catkernels.commands.check import poisoned_results
from catkernels.pool import num_cores, run_apart

TIME_LIMIT_S = 280
STEP_LIMIT_S = 120
CHECKED_BY = 0.6  # of the time: a self-check that hangs must leave some to the figures
ROUNDS = 10
LAUNCHES = 200
ATTENTIONS = ("ipsa", "cpsa")
OPERATIONS = {subject.name: subject for subject in (IPSA, CPSA, *BLOCKS, *PARTS)}
PRECISION = "float32" if DEVICE.type == "cpu" else "bfloat16"
DTYPE = getattr(torch, PRECISION)
TRIAL_REPEATED = (
    IPSACase("tiny", 1, 7, 9, num_heads=1, head_dim=16),
    CPSACase("tiny", 1, 7, 14, 4),
    MLPCase("tiny", 1, 3, 7, 32),
)


@dataclass(frozen=True)
class Step:
    """One thing that is run or timed, in the process that has the device.

    Attributes:
        run: the function that does it and returns rows; importable.
    """

    key: str
    run: Callable[[], list[dict]]


def steps(target: object, trial: bool) -> Iterator[Step]:
    """Everything behind the self-check, what matters most first."""
    yield Step("ceilings", measure_ceilings)
    for case in TRIAL_REPEATED if trial else prebuild.REPEATED:
        for dtype in (torch.float32,) if trial else (torch.bfloat16, torch.float16):
            name = str(dtype).removeprefix("torch.")
            run = functools.partial(repeat, case, dtype, 2 if trial else LAUNCHES, target)
            yield Step(f"bits {prebuild.kind(case)}, {case}, {name}", run)
    yield from _attention_steps(target, trial, compiled=False)
    yield from _model_steps(trial)
    yield from _block_steps(target, trial)
    yield from _attention_steps(target, trial, compiled=True)


def _attention_steps(target: object, trial: bool, *, compiled: bool) -> Iterator[Step]:
    shapes = [operation.TRIAL_SHAPE] if trial else cat_stages("small", batch=256)
    for stage, shape in enumerate(shapes, 1):
        for name in ATTENTIONS:
            for direction in ("forward", "backward"):
                case = operation.Case("stages", shape, PRECISION, direction)
                if compiled:
                    run = functools.partial(time_operation, name, case, "compiled")
                    yield Step(f"{name} {shape} {direction} compiled", run)
                    continue
                run = functools.partial(time_operation, name, case, "sdpa")
                yield Step(f"{name} {shape} {direction} sdpa", run)
                candidates = [Candidate("")]
                if not trial:
                    candidates = prebuild.open_candidates(name, direction, stage, target)
                for candidate in candidates:
                    run = functools.partial(time_operation, name, case, "catkernels", candidate)
                    yield Step(f"{name} {shape} {direction} catkernels {candidate}", run)


def _block_steps(target: object, trial: bool) -> Iterator[Step]:
    """Blocks and their parts, each pass and stage that a prediction was made of."""
    shapes = [operation.TRIAL_SHAPE] if trial else cat_stages("small", batch=256)
    for title, direction, stage in predictions.predictions():
        name = next(name for name in OPERATIONS if operation.title(name) == title)
        if name not in ATTENTIONS and stage <= len(shapes):
            case = operation.Case("stages", shapes[stage - 1], PRECISION, direction)
            candidates = [Candidate("")]
            if (name, direction) == ("mlp", "forward") and not trial:
                candidates += prebuild.streamed(prebuild.MLPS[stage - 1], target)
            for candidate in candidates:
                run = functools.partial(time_operation, name, case, "catkernels", candidate)
                yield Step(f"{name} {case.shape} {direction} catkernels {candidate}", run)


def _model_steps(trial: bool) -> Iterator[Step]:
    model, batch = ("trial", 2) if trial else ("cat_small", 128)
    for mode, images in (("inference", batch), ("training", batch), ("latency", 1), ("replay", 1)):
        case = bench_model.Case(model, mode, images)
        for provider in ("catkernels", "patched")[: 2 if images > 1 else 1]:
            yield Step(f"{case} {provider}", functools.partial(time_model, case, provider))


def measure_ceilings() -> list[dict]:
    """What a large copy and a large product reach."""
    return [{"dtype": str(DTYPE)} | asdict(roofline.ceilings(DTYPE))]


def repeat(case, dtype: torch.dtype, launches: int, target: object) -> list[dict]:
    """Whether a call has the same bits each time, and in bfloat16 with any number of stages.

    The number of stages changes not one sum: what differs was read too early.
    """
    inputs = case.inputs(dtype, DEVICE, seed=0)
    grad_out = None
    if not case.unsupported_reasons(DEVICE, dtype, needs_grad=True):
        grad_out = random_grad(case.shape, torch.empty(0, dtype=dtype, device=DEVICE))

    def differing(candidate: Candidate, times: int) -> dict:
        differ, launches = [], 0
        with candidate.launched():
            while launches < times and not differ:
                differ = check.differing(poisoned_results(case.attend, inputs, grad_out), first)
                launches += 1
        return {"launch": str(candidate), "launches": launches, "differ": differ}

    def fits(candidate: Candidate) -> bool:
        from triton.runtime.errors import OutOfResources

        with candidate.launched():
            try:
                poisoned_results(case.attend, inputs, grad_out)
            except OutOfResources:
                return False
        return True

    first = poisoned_results(case.attend, inputs, grad_out)
    rows = [differing(Candidate(""), launches)]
    if dtype != torch.float16:
        others = prebuild.other_stages(replace(case, batch=1), dtype, target)
        rows += [differing(other, 1) for other in others if fits(other)]
    if any(row["differ"] for row in rows):
        raise RuntimeError(f"other bits: {json.dumps(rows)}")
    return rows


def time_operation(
    name: str, case: operation.Case, provider: str, candidate: Candidate | None = None
) -> list[dict]:
    """One provider's row of the sweep over stages; a candidate launch's has its ``launch``."""
    stopwatch = harness.Stopwatch()
    with harness.own_stream(), (candidate or Candidate("")).launched(), _gradients_can_repeat():
        operation.run(stopwatch, OPERATIONS[name], case, provider, rounds=ROUNDS)
    row = stopwatch.extra_info
    if candidate is not None and candidate.launch is not None:
        row |= {"provider": "candidate", "launch": str(candidate), "table": candidate.table}
    return [row]


def time_model(case: bench_model.Case, provider: str) -> list[dict]:
    """A row of the whole model, the official one and ours, or the official one patched."""
    clock = time.perf_counter if case.mode == "latency" else harness.CLOCK
    stopwatch = harness.Stopwatch(clock)
    capture = case.mode == "replay"
    with harness.own_stream():
        bench_model.race(stopwatch, case, provider, capture=capture, clock=clock)
    return [stopwatch.extra_info]


def _gradients_can_repeat():
    """A context in which a compiled forward pass keeps what its backward pass would reuse."""
    import torch._functorch.config

    return torch._functorch.config.patch(donated_buffer=False)


def perform(step: Step) -> list[dict]:
    """In the process that has the device."""
    torch.set_num_threads(1)
    try:
        return step.run()
    except pytest.skip.Exception as skipped:
        # a peer that cannot run here, or is wrong, is no failure of ours
        return [{"left_out": str(skipped)}]


class Record:
    """The file: a line about the machine, then a line for each key."""

    def __init__(self, path: Path, about: dict) -> None:
        self.path, self.lines = path, []
        if path.exists():
            # a line that was cut off in the middle is none
            self.lines = [line for line in map(_parsed, path.read_text().splitlines()) if line]
        if not self.lines:
            now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            self.lines = [{"machine_info": about, "datetime": now}]
        if not machine.is_same(self.lines[0].get("machine_info", {}), about):
            raise ValueError(f"{path} is of another device or other versions: name another file")
        path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))

    def holds(self, key: str) -> bool:
        """Whether it is done; what failed is tried again."""
        return any(line.get("key") == key and not line["failure"] for line in self.lines)

    def add(self, key: str, rows: list[dict], failure: str | None, seconds: float) -> None:
        line = {"key": key, "rows": rows, "failure": failure, "seconds": round(seconds, 2)}
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{seconds:6.1f} s  {key}  {failure or _brief(rows)}", flush=True)


def _parsed(line: str) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _brief(rows: list[dict]) -> str:
    """The figures of a line in words."""
    said = []
    for row in rows:
        if "speedup" in row:
            share = f", {row['percent_of_roofline']:.0f} %" if row["operation"] != "model" else ""
            void = ", void" if row["void"] else ""
            said.append(f"{row['contender_ms']:.4g} ms, {row['speedup']:.2f}x{share}{void}")
        elif "bytes_per_s" in row:
            said.append(f"{row['bytes_per_s'] / 1e12:.2f} TB/s, {row['flops_per_s'] / 1e12:.0f} TF")
        elif "left_out" in row:
            said.append(row["left_out"])
        elif "failures" in row:
            said.append(f"{len(row['failures'])} failures")
        elif "verdict" in row:
            said.append(f"{row['verdict']}: {row['detail']}")
        elif "launches" in row:
            said.append(f"{row['launch']}: the same bits")
    return "; ".join(said)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path, help="file to write, or to go on with")
    parser.add_argument("--trial", action="store_true", help="tiny, to see that all of it runs")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT_S, metavar="SECONDS")
    arguments = parser.parse_args()

    start = time.monotonic()
    record = Record(arguments.output, machine.describe() | {"trial": arguments.trial})
    print(json.dumps(record.lines[0]), flush=True)
    target = None
    if not arguments.trial:
        from catkernels.kernels.compile_ahead import current_target

        target = current_target()
        print(f"triton_key {prebuild.triton_key()}", flush=True)
        _compile(record, target)
    end = start + arguments.time_limit
    left = _check(record, arguments.trial, start + CHECKED_BY * arguments.time_limit)
    left += _run(record, steps(target, arguments.trial), end)
    if left:
        print(f"out of time, run again to go on with: {'; '.join(left)}")
    failed = {line["key"] for line in record.lines[1:] if not record.holds(line["key"])}
    for key in sorted(failed):
        print(f"FAILED: {key}")
    print("\n".join(predictions.beside(report.timed_rows(record.lines))))
    print(f"{time.monotonic() - start:.0f} s")
    return 1 if left or failed else 0


def _compile(record: Record, target: object) -> None:
    """Everything that follows; again in every run, since the cache may be gone."""
    start = time.monotonic()
    failures = prebuild.compile_all(target, max(1, num_cores() - 1), {"OMP_NUM_THREADS": "1"})
    for failure in failures:
        print(f"does not compile: {failure}")
    record.add("compile", [{"failures": failures}], None, time.monotonic() - start)


def _check(record: Record, trial: bool, end: float) -> list[str]:
    """The self-check of families not found right yet, until time is up; returns what is left."""
    environment = {"TRITON_INTERPRET": "1"} if trial else None
    if trial:
        tasks = families.interpreted_tasks()
    else:
        from catkernels.kernels.compile_ahead import current_target

        precisions = (*families.PRECISIONS, "tf32")
        tasks = families.tasks(DEVICE.type, current_target(), precisions)
    waiting = [task for task in tasks if not record.holds(f"check {task}")]
    workers = min(check.RUNNING, num_cores())
    left = [f"check {task}" for task in waiting]
    for row in check.judged_rows(waiting, workers=workers, until=end, environment=environment):
        left.remove(f"check {row.name}")
        fine = row.verdict in ("right", "not served")
        failure = None if fine else f"{row.verdict}: {row.detail}"
        record.add(f"check {row.name}", [asdict(row)], failure, row.seconds)
    return left


def _run(record: Record, steps: Iterator[Step], end: float) -> list[str]:
    """One step after the other in a process of its own, until time is up; returns what is left."""
    waiting = [step for step in steps if not record.holds(step.key)]
    left = [step.key for step in waiting]
    for outcome in run_apart(perform, waiting, workers=1, timeout_s=STEP_LIMIT_S, until=end):
        left.remove(outcome.task.key)
        record.add(outcome.task.key, outcome.result or [], outcome.failure, outcome.seconds)
    return left


if __name__ == "__main__":
    sys.exit(main())
