"""Whether the kernels are right on this very device: compiled, run and judged, family by family.

Every result is judged against float64 by the error budget, and repeated for the same bits. Each
family of kernels runs in a process of its own, so that one that crashes takes no other along.
"""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import catkernels
from catkernels import machine
from catkernels.accuracy import OutOfBudget, assert_draws_within_error_budget, tf32_products
from catkernels.cases import Inputs, converted, random_grad, results
from catkernels.dropout import SameDropout
from catkernels.families import (
    PRECISIONS,
    Case,
    Task,
    compilations,
    compile_case,
    interpreted_tasks,
    products,
    tasks,
)
from catkernels.pool import num_cores, run_apart
from catkernels.torch_state.device import best_device

SEED = 0x1234_5678_9ABC_DEF0  # of dropout
# Small results are judged by several draws together, so that no luck of plain PyTorch decides.
DRAWS = 4
# Processes that share the device at a time.
RUNNING = 4

NEWER_PTXAS = """What to do: ptxas, the assembler that Triton ships, is the first to suspect, for a
known fault on Hopper. Install a newer one, `pip install nvidia-cuda-nvcc`, set TRITON_PTXAS_PATH to
its ptxas, and check again."""
REMEDY = """What is wrong is ours to mend: please report it, with the file that --json writes.
Until then backend="reference" computes the same in plain PyTorch, on every device."""


@dataclass(frozen=True)
class Row:
    """What became of a family in one dtype.

    Attributes:
        verdict: "right", "wrong", "crashed", "does not compile", or "not served".
        detail: in words; of what is wrong the tensor and its error.
        share: the largest error in units of its budget.
        compile_seconds: of one core.
    """

    name: str
    verdict: str
    detail: str
    share: float | None = None
    compile_seconds: float = 0.0
    seconds: float = 0.0


def run(*, interpret: bool = False, output: Path | None = None) -> int:
    """Check what is here, print a line a family and a verdict.

    Args:
        interpret: without a GPU, run a few small calls in Triton's interpreter.
        output: JSON file for everything that is printed, for a report.

    Returns:
        The exit status: 0 where all is right, 1 where anything is not or the kernels serve nothing.

    Raises:
        ValueError: there is no GPU here, and ``interpret`` was not asked for.
    """
    device = best_device()
    if device.type == "cpu" and not interpret:
        raise ValueError(
            "there is no GPU here, so there is nothing to check: --interpret runs a few small "
            "calls in Triton's interpreter"
        )
    about = {"catkernels": catkernels.__version__, **machine.describe()}
    print(", ".join(f"{k} {v}" for k, v in about.items() if v and k != "device_state"))
    rows = []
    for row in interpreted_rows() if interpret else device_rows(device):
        rows.append(row)
        print(f"{row.name:34} {row.verdict:16} {row.detail}", flush=True)
    wrong = [row.name for row in rows if row.verdict not in ("right", "not served")]
    where = "in Triton's interpreter" if interpret else f"on {about['device']}"
    checked = any(row.verdict != "not served" for row in rows)
    if wrong:
        verdict = f"wrong {where}: {'; '.join(wrong)}"
    else:
        verdict = f"{'all right' if checked else 'nothing was checked'} {where}"
    print(verdict)
    if wrong:
        print(f"{NEWER_PTXAS}\n{REMEDY}" if "ptxas" in about else REMEDY)
    if output:
        content = {"machine_info": about, "verdict": verdict, "rows": [asdict(row) for row in rows]}
        output.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if wrong or not checked else 0


def interpreted_rows() -> Iterator[Row]:
    """A few small calls in Triton's interpreter."""
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return judged_rows(interpreted_tasks(), workers=num_cores(), environment=environment)


def device_rows(device: torch.device, precisions: tuple[str, ...] = PRECISIONS) -> Iterator[Row]:
    """Compile and run every family on a GPU, in each dtype that the kernels serve."""
    from catkernels.kernels.compile_ahead import current_target

    checked = tasks(device.type, current_target(), precisions)
    print(f"compiling in {num_cores()} processes", flush=True)
    environment = {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    compiled = run_apart(
        compile_case, compilations(checked), workers=num_cores(), environment=environment
    )
    seconds = {str(task): 0.0 for task in checked}
    failures: dict[str, str] = {}
    for outcome in compiled:
        seconds[str(outcome.task)] += outcome.seconds
        if outcome.failure:
            (case,) = outcome.task.cases
            failures.setdefault(str(outcome.task), f"{case.name}: {outcome.failure}")
    for name, failure in failures.items():
        yield Row(name, "does not compile", failure, compile_seconds=seconds[name])
    sound = [task for task in checked if str(task) not in failures]
    for row in judged_rows(sound, workers=RUNNING):
        yield replace(row, compile_seconds=seconds[row.name])


def judged_rows(
    tasks: list[Task],
    *,
    workers: int,
    until: float = math.inf,
    environment: dict[str, str] | None = None,
) -> Iterator[Row]:
    """Run and judge families, each in a process that it may break; see `run_apart`."""
    outcomes = run_apart(
        judge, tasks, workers=workers, timeout_s=120, until=until, environment=environment
    )
    for outcome in outcomes:
        if outcome.result is None:
            failure = outcome.failure or "it gave nothing"
            yield Row(str(outcome.task), "crashed", failure, seconds=outcome.seconds)
        else:
            yield replace(outcome.result, seconds=outcome.seconds)


def judge(task: Task) -> Row:
    """Run a family's cases and judge them, in a process that only runs kernels."""
    cases, shares, forward_only = list(task.passes()), [], 0
    if not cases:
        reasons = task.cases[0].unsupported_reasons(torch.device(task.device), task.dtype, False)
        why = "; ".join(reasons) or "none of its calls is of this dtype"
        return Row(str(task), "not served", f"by the kernels: {why}")
    device = torch.device(task.device)
    with products(task.tf32):
        for case, differentiate in cases:
            forward_only += not differentiate
            try:
                shares.append(_judge_case(case, task, device, differentiate))
            except OutOfBudget as error:
                return Row(str(task), "wrong", str(error))
    note = f", {forward_only} of them forward only" if forward_only else ""
    detail = (
        f"{len(cases)} calls{note}: at most {max(shares):.2f} of the error budget, "
        f"the same bits {task.repeats + 1} times"
    )
    return Row(str(task), "right", detail, max(shares))


def _judge_case(case: Case, task: Task, device: torch.device, differentiate: bool) -> float:
    small = math.prod(case.shape.size) < 2**18
    draws = []
    for seed in range(DRAWS if small and device.type != "cpu" else 1):
        inputs = case.inputs(task.dtype, device, seed=seed)
        dropout: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if case.dropout_p:
            dropout = SameDropout(SEED, case.kept(SEED).to(device))
        with dropout:
            draws.append(_compared(case, task, inputs, differentiate))
    return assert_draws_within_error_budget(draws, case.name)


def _compared(
    case: Case, task: Task, inputs: Inputs, differentiate: bool
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Results by the kernels, by plain PyTorch in the same dtype, and in float64."""
    like = torch.empty(0, dtype=task.dtype, device=task.device)
    grad_out = random_grad(case.shape, like) if differentiate else None
    actual = poisoned_results(case.attend, inputs, grad_out)
    for _ in range(task.repeats):
        again = poisoned_results(case.attend, inputs, grad_out)
        for name in differing(again, actual):
            raise OutOfBudget(f"{case.name}: {name} has other bits when it is computed again")
    with tf32_products():
        same_dtype = results(case.specified, inputs, grad_out)
    grad64 = None if grad_out is None else grad_out.double()
    float64 = results(case.specified, converted(inputs, torch.float64), grad64)
    return {name: (actual[name], same_dtype[name], truth) for name, truth in float64.items()}


def differing(results: dict[str, Tensor], others: dict[str, Tensor]) -> list[str]:
    """The names of those results whose bits are not the same."""
    return [name for name, t in results.items() if not torch.equal(_bits(t), _bits(others[name]))]


def _bits(tensor: Tensor) -> Tensor:
    """As bytes, of which those of NaN are equal to themselves."""
    return tensor.contiguous().view(torch.uint8)


def poisoned_results(
    attend: Callable[..., Tensor], inputs: Inputs, grad_out: Tensor | None
) -> dict[str, Tensor]:
    """`results` where all memory that is not written is NaN, so that it shows."""
    before = torch.are_deterministic_algorithms_enabled()
    # PyTorch fills what `torch.empty` returns where it is asked for deterministic algorithms
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            return results(attend, inputs, grad_out)
        finally:
            torch.use_deterministic_algorithms(before)
