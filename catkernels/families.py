"""The families of kernels: of each the calls that are compiled ahead, checked and timed.

A new family is an entry in `FAMILIES`, of cases as `Case` has them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from catkernels.block_cases import JoinedCPSACase, MLPCase, NormCase, ProjectionCase
from catkernels.cases import CPSACase, Inputs, IPSACase, Shape, results
from catkernels.torch_state.precision import allows_tf32


class Case(Protocol):
    """A call that can be judged, see `catkernels.cases`."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def dropout_p(self) -> float: ...
    @property
    def mixed(self) -> bool:
        """Of half precision and float32; in float32 alone it is left out."""

    @property
    def attend(self) -> Callable[..., Tensor]:
        """By the kernels, of the inputs in their order."""

    @property
    def specified(self) -> Callable[..., Tensor]:
        """By the reference."""

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs: ...
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
        CPSACase("2, without biases", 2, 7, 14, 40, without=("qkv_bias", "proj_bias")),
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
    "cpsa with norm and residual": (
        JoinedCPSACase("1, padded", 4, 5, 7, 64),
        JoinedCPSACase("2", 2, 7, 14, 96),
        JoinedCPSACase("12, padded", 1, 27, 20, 192),
        JoinedCPSACase("CAT-S, stage 2, 8 images", 8, 28, 28, 192),
        JoinedCPSACase("CAT-S, stage 3, DropPath", 2, 14, 14, 384, drop_path=0.2),
        JoinedCPSACase("CAT-S, stage 4", 2, 7, 7, 768),
    ),
    "mlp": (
        MLPCase("32 channels", 2, 7, 9, 32),
        MLPCase("CAT-T, stage 1", 1, 56, 56, 64),
        MLPCase("CAT-S, stage 1, 8 images", 8, 56, 56, 96),
        MLPCase("CAT-T, stage 2", 1, 28, 28, 128),
        MLPCase("CAT-S, stage 2", 1, 28, 28, 192),
        MLPCase("CAT-S, stage 1, DropPath", 2, 56, 56, 96, drop_path=0.2),
        MLPCase("CAT-S, stage 2, DropPath", 2, 28, 28, 192, drop_path=0.2),
    ),
    "mlp, more channels": (
        MLPCase("CAT-S, stage 3", 1, 14, 14, 384),
        MLPCase("CAT-S, stage 4", 1, 7, 7, 768),
    ),
    "norm": (
        NormCase("CAT-S, stage 1", 1, 56, 56, 96),
        NormCase("CAT-S, stage 2", 1, 28, 28, 192),
        NormCase("CAT-S, stage 3", 1, 14, 14, 384),
        NormCase("CAT-S, stage 4", 1, 7, 7, 768),
    ),
    "projections": (
        ProjectionCase("32 channels", 2, 7, 9, 32),
        ProjectionCase("CAT-T, stage 1", 1, 56, 56, 64),
        ProjectionCase("CAT-S, stage 1, 8 images", 8, 56, 56, 96),
        ProjectionCase("CAT-T, stage 2", 1, 28, 28, 128),
        ProjectionCase("CAT-S, stage 2", 1, 28, 28, 192),
        ProjectionCase("CAT-S, stage 1, DropPath", 2, 56, 56, 96, drop_path=0.2),
        ProjectionCase("CAT-S, stage 2, DropPath", 2, 28, 28, 192, drop_path=0.2),
    ),
    "mlp, map in float32": (
        MLPCase("32 channels", 2, 7, 9, 32, mixed=True, drop_path=0.2),
        MLPCase("CAT-T, stage 1", 2, 56, 56, 64, mixed=True, drop_path=0.2),
        MLPCase("CAT-S, stage 1", 2, 56, 56, 96, mixed=True, drop_path=0.2),
        MLPCase("CAT-T, stage 2", 2, 28, 28, 128, mixed=True, drop_path=0.2),
        MLPCase("CAT-S, stage 2", 2, 28, 28, 192, mixed=True, drop_path=0.2),
        MLPCase("CAT-S, stage 3", 2, 14, 14, 384, mixed=True, drop_path=0.2),
        MLPCase("CAT-S, stage 4", 2, 7, 7, 768, mixed=True, drop_path=0.2),
    ),
    "cpsa with norm and residual, map in float32": (
        JoinedCPSACase("12, padded", 2, 27, 20, 192, mixed=True, drop_path=0.2),
        JoinedCPSACase("stage 2", 2, 28, 28, 192, mixed=True, drop_path=0.2),
        JoinedCPSACase("stage 3", 2, 14, 14, 384, mixed=True, drop_path=0.2),
        JoinedCPSACase("stage 4", 2, 7, 7, 768, mixed=True, drop_path=0.2),
    ),
    "norm and projections, map in float32": (
        NormCase("norm, stage 1", 2, 56, 56, 96, mixed=True, drop_path=0.2),
        NormCase("norm, stage 2", 2, 28, 28, 192, mixed=True, drop_path=0.2),
        NormCase("norm, stage 3", 2, 14, 14, 384, mixed=True, drop_path=0.2),
        NormCase("norm, stage 4", 2, 7, 7, 768, mixed=True, drop_path=0.2),
        ProjectionCase("CAT-T, stage 1", 2, 56, 56, 64, mixed=True, drop_path=0.2),
        ProjectionCase("CAT-S, stage 1", 2, 56, 56, 96, mixed=True, drop_path=0.2),
        ProjectionCase("CAT-S, stage 2", 2, 28, 28, 192, mixed=True, drop_path=0.2),
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
    repeats: int = 20
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


def tasks(device: str, target: object, precisions: tuple[str, ...]) -> list[Task]:
    """Every family in each dtype; of "float32" the products follow torch's setting."""
    return [
        Task(family, cases, dtype, tf32, device, target)
        for family, cases in FAMILIES.items()
        for dtype, tf32 in map(_precision, precisions)
    ]


def _precision(name: str) -> tuple[torch.dtype, bool]:
    """ "tf32" is float32 with such products whatever torch's setting is, "float32" follows it."""
    if name == "tf32":
        return torch.float32, True
    return getattr(torch, name), allows_tf32()


def interpreted_tasks() -> list[Task]:
    """Those calls in float32 and float16: the interpreter has no products of bfloat16."""
    return [
        Task(family, cases, dtype, allows_tf32(), "cpu", repeats=1)
        for family, cases in INTERPRETED.items()
        for dtype in (torch.float32, torch.float16)
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


@contextlib.contextmanager
def products(tf32: bool) -> Iterator[None]:
    """A context in which products of float32 are TF32, or exact."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
