"""Whether the kernels are right on this very device: compiled, run and judged, family by family.

Every result is judged against float64 by the error budget, and repeated for the same bits. Each
family of kernels runs in a process of its own, so that one that crashes takes no other along.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from catkernels import machine
from catkernels.accuracy import OutOfBudget, assert_draws_within_error_budget, tf32_products
from catkernels.cases import CPSACase, Inputs, IPSACase, Shape, converted, random_grad, results
from catkernels.dropout import SameDropout
from catkernels.pool import num_cores, run_apart
from catkernels.torch_state.device import best_device
from catkernels.torch_state.precision import allows_tf32

SEED = 0x1234_5678_9ABC_DEF0  # of dropout
REPEATS = 20
# Small results are judged by several draws together, so that no luck of plain PyTorch decides.
DRAWS = 4
# Processes that share the device at a time.
RUNNING = 4

NEWER_PTXAS = """What to do: ptxas, the assembler that Triton ships, is the first to suspect, for a
known fault on Hopper. Install a newer one, `pip install nvidia-cuda-nvcc`, set TRITON_PTXAS_PATH to
its ptxas, and check again."""
REMEDY = """What is wrong is ours to mend: please report it, with the file that --json writes.
Until then backend="reference" computes the same in plain PyTorch, on every device."""


class Case(Protocol):
    """A call that can be judged, see `catkernels.cases`."""

    name: str
    dropout_p: float
    mixed: bool  # of half precision and float32; in float32 alone it is left out

    @property
    def shape(self) -> Shape: ...
    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs: ...
    def attend(self, *inputs: Tensor | None) -> Tensor: ...
    def specified(self, *inputs: Tensor | None) -> Tensor: ...
    def kept(self, seed: int) -> Tensor: ...
    def unsupported_reasons(
        self, device: torch.device, dtype: torch.dtype, needs_grad: bool
    ) -> list[str]: ...


# A family is what shares kernels. Of each there are calls as small as they show every branch, and
# one as large as a model's.
FAMILIES: dict[str, tuple[Case, ...]] = {
    "ipsa": (
        IPSACase("whole windows", 2, 14, 21),
        IPSACase("padded", 2, 16, 10),
        IPSACase("several windows a tile, padded", 4, 11, 10, patch_size=4),
        IPSACase("windows of 8 x 8", 1, 16, 8, patch_size=8),
        IPSACase("without a table", 1, 14, 14, without=("bias_table",)),
        IPSACase("table in float32", 1, 14, 14, mixed=True),
        IPSACase("CAT-S, stage 1, 8 images", 8, 56, 56, num_heads=3),
    ),
    "ipsa, wide heads": (
        IPSACase("64 channels", 1, 14, 14, head_dim=64),
        IPSACase("96 channels, padded", 1, 9, 14, head_dim=96),
        IPSACase("128 channels", 1, 14, 14, head_dim=128),
    ),
    "ipsa, dropout": (
        IPSACase("whole windows", 2, 14, 21, dropout_p=0.25),
        IPSACase("padded", 2, 16, 10, dropout_p=0.5),
    ),
    "cpsa, 1 patch": (
        CPSACase("padded", 4, 5, 7, 9),
        CPSACase("CAT-S, stage 4, 8 images", 8, 7, 7, 768),
    ),
    "cpsa, 2 to 16 patches": (
        CPSACase("2", 2, 7, 14, 40),
        CPSACase("3, padded", 2, 20, 7, 17),
        CPSACase("4", 2, 14, 14, 384),
        CPSACase("4 of 8 x 8", 2, 16, 16, 32, patch_size=8),
        CPSACase("16, padded", 1, 27, 25, 192),
        CPSACase("CAT-S, stage 2, 8 images", 8, 28, 28, 192),
        CPSACase("CAT-S, stage 3, 8 images", 8, 14, 14, 384),
    ),
    "cpsa, 17 to 64 patches": (
        CPSACase("25, padded", 1, 34, 30, 16),
        CPSACase("64", 1, 56, 56, 96),
        CPSACase("CAT-S, stage 1, 8 images", 8, 56, 56, 96),
    ),
    "cpsa, more patches": (
        CPSACase("90, padded", 1, 60, 70, 5),
        CPSACase("stage 1 of 512 x 512", 1, 128, 128, 96),
    ),
    "cpsa, map in float32": (
        CPSACase("stage 1", 1, 56, 56, 96, mixed=True),
        CPSACase("stage 2", 1, 28, 28, 192, mixed=True),
        CPSACase("stage 3", 1, 14, 14, 384, mixed=True),
        CPSACase("stage 4", 2, 7, 7, 768, mixed=True),
    ),
    "cpsa, dropout": (
        CPSACase("4", 2, 14, 14, 17, dropout_p=0.25),
        CPSACase("64", 1, 56, 56, 8, dropout_p=0.25),
        CPSACase("90", 1, 63, 70, 3, dropout_p=0.25),
    ),
}
# What an interpreter does in seconds.
INTERPRETED: dict[str, tuple[Case, ...]] = {
    "ipsa": (IPSACase("padded", 1, 9, 7, num_heads=1, head_dim=16),),
    "cpsa, 2 to 16 patches": (CPSACase("2, padded", 1, 7, 9, 4),),
}
PRECISIONS = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Task:
    """A family in one dtype, or one case of it.

    Attributes:
        tf32: torch's setting for products of float32.
        target: what the kernels are compiled for, as Triton has it.
        forward: leave the backward pass out.
    """

    family: str
    cases: tuple[Case, ...]
    dtype: torch.dtype
    tf32: bool
    device: str
    target: object = None
    repeats: int = REPEATS
    forward: bool = False

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.family}, {'TF32' if self.tf32 and name == 'float32' else name}"

    def passes(self) -> Iterator[tuple[Case, bool]]:
        """The cases that the kernels serve, and whether they serve the backward pass too."""
        device = torch.device(self.device)
        for case in self.cases:
            if case.mixed and self.dtype == torch.float32:
                continue
            if not case.unsupported_reasons(device, self.dtype, needs_grad=False):
                reasons = case.unsupported_reasons(device, self.dtype, needs_grad=True)
                yield case, not reasons and not self.forward


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
        The exit status: 0 where all is right, else 1.

    Raises:
        ValueError: there is no GPU here, and ``interpret`` was not asked for.
    """
    device = best_device()
    if device.type == "cpu" and not interpret:
        raise ValueError(
            "there is no GPU here, so there is nothing to check: --interpret runs a few small "
            "calls in Triton's interpreter"
        )
    about = machine.describe()
    print(", ".join(f"{k} {v}" for k, v in about.items() if v and k != "device_state"))
    rows = []
    for row in interpreted_rows() if interpret else device_rows(device):
        rows.append(row)
        print(f"{row.name:34} {row.verdict:16} {row.detail}", flush=True)
    wrong = [row.name for row in rows if row.verdict not in ("right", "not served")]
    where = "in Triton's interpreter" if interpret else f"on {about['device']}"
    verdict = f"wrong {where}: {'; '.join(wrong)}" if wrong else f"all right {where}"
    print(verdict)
    if wrong:
        print(f"{NEWER_PTXAS}\n{REMEDY}" if "ptxas" in about else REMEDY)
    if output:
        content = {"machine_info": about, "verdict": verdict, "rows": [asdict(row) for row in rows]}
        output.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if wrong else 0


def interpreted_rows() -> Iterator[Row]:
    """A few small calls in Triton's interpreter."""
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return judged_rows(interpreted_tasks(), workers=num_cores(), environment=environment)


def interpreted_tasks() -> list[Task]:
    """Those calls in float32 and float16: the interpreter has no products of bfloat16."""
    return [
        Task(family, cases, dtype, allows_tf32(), "cpu", repeats=1)
        for family, cases in INTERPRETED.items()
        for dtype in (torch.float32, torch.float16)
    ]


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


def judged_rows(tasks: list[Task], **options) -> Iterator[Row]:
    """Run and judge families, each in a process that it may break; ``options`` of `run_apart`."""
    for outcome in run_apart(judge, tasks, timeout_s=120, **options):
        if outcome.failure:
            yield Row(str(outcome.task), "crashed", outcome.failure, seconds=outcome.seconds)
        else:
            yield replace(outcome.result, seconds=outcome.seconds)


def _precision(name: str) -> tuple[torch.dtype, bool]:
    """ "tf32" is float32 with such products whatever torch's setting is, "float32" follows it."""
    if name == "tf32":
        return torch.float32, True
    return getattr(torch, name), allows_tf32()


def tasks(device: str, target: object, precisions: tuple[str, ...]) -> list[Task]:
    """Every family in each dtype; of "float32" the products follow torch's setting."""
    return [
        Task(family, cases, dtype, tf32, device, target)
        for family, cases in FAMILIES.items()
        for dtype, tf32 in map(_precision, precisions)
    ]


def compilations(tasks: list[Task]) -> list[Task]:
    """A task for each case, what takes longest first."""
    single = [replace(task, cases=(case,)) for task in tasks for case, _ in task.passes()]
    return sorted(single, key=lambda task: not task.family.startswith("cpsa"))


def compile_case(task: Task) -> int:
    """Compile what a case launches, in a process that sees no GPU; returns how many kernels.

    Triton's cache has them then, for every process of this machine.
    """
    from catkernels.kernels.compile_ahead import build_launcher, compiling_for
    from catkernels.ops.operator import take_cpu_tensors

    take_cpu_tensors()
    compiled = []
    keep = compiling_for(task.target, lambda name, kernel, grid: compiled.append(kernel))
    with products(task.tf32), keep:
        for case, differentiate in task.passes():
            inputs = case.inputs(task.dtype, torch.device("cpu"), seed=0)
            grad_out = torch.empty(case.shape.size, dtype=task.dtype) if differentiate else None
            results(case.attend, inputs, grad_out)
    for kernel in compiled:
        build_launcher(kernel)
    return len(compiled)


def judge(task: Task) -> Row:
    """Run a family's cases and judge them, in a process that only runs kernels."""
    cases, shares, forward_only = list(task.passes()), [], 0
    if not cases:
        return Row(str(task), "not served", "by the kernels: the reference serves it")
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
    small = sum(
        t.numel() for t in case.inputs(task.dtype, device, seed=0).values() if t is not None
    )
    draws = []
    for seed in range(DRAWS if small < 2**20 and device.type != "cpu" else 1):
        inputs = case.inputs(task.dtype, device, seed=seed)
        dropout = contextlib.nullcontext()
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


def poisoned_results(attend, inputs: Inputs, grad_out: Tensor | None) -> dict[str, Tensor]:
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


@contextlib.contextmanager
def products(tf32: bool) -> Iterator[None]:
    """A context in which products of float32 are TF32, or exact."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
