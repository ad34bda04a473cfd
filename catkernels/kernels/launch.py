"""How kernels are launched: the problem as they see it, with which resources, on which device.

A family has a `Problem` of its own and tables: functions that say how a problem is launched.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton

from catkernels.reference import num_patches
from catkernels.torch_state.precision import allows_tf32

# Architectures that want launches of their own; every other device takes `DEFAULT`'s.
AMPERE, HOPPER, BLACKWELL, CDNA = "sm_80", "sm_90", "sm_100", "gfx9"
DEFAULT = AMPERE


@dataclass(frozen=True)
class Launch:
    """The resources of one kernel launch."""

    num_warps: int
    num_stages: int

    def constants(self) -> dict[str, int]:
        """What of it the kernel is called with: the launch's own fields, in capitals."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@functools.cache
def architecture(device: torch.device) -> str:
    """The row of the launch tables that serves ``device``, which must be the current one."""
    if triton.knobs.runtime.interpret:
        return DEFAULT
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        # RDNA (gfx10 and later) has half as many threads to a warp, and no float32 matrix products
        return CDNA if target.arch.startswith(CDNA) else DEFAULT
    if target.backend != "cuda":
        # an XPU's is no number, but a dictionary of its properties
        return DEFAULT
    # sm_120 is absent on purpose: consumer Blackwell multiplies with Ampere's instructions
    return {9: HOPPER, 10: BLACKWELL}.get(target.arch // 10, AMPERE)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What every family of kernels knows of a call: what it computes with, and where."""

    dtype: torch.dtype
    device: torch.device  # must be the current one where launches are looked up
    precision: str  # `input_precision` of `tl.dot`

    @property
    def architecture(self) -> str:
        return architecture(self.device)


@dataclass(frozen=True, kw_only=True)
class MapProblem(Problem):
    """A call on a map that is cut into patches, which attend with dropout."""

    batch: int
    height: int
    width: int
    patch_size: int
    dropout_p: float

    @property
    def num_patches(self) -> int:
        """Patches of a map, those that reach beyond it included."""
        return num_patches(self.height, self.width, self.patch_size)

    @property
    def padded(self) -> bool:
        return self.height % self.patch_size != 0 or self.width % self.patch_size != 0

    def dropout_arguments(self) -> dict[str, int | float]:
        """Dropout decides by 16 random bits, and rescales by what that makes of its probability."""
        drop_threshold = min(round(self.dropout_p * 2**16), 2**16 - 1)
        return {
            "drop_threshold": drop_threshold,
            "keep_scale": 2**16 / (2**16 - drop_threshold),
        }


def pick(table: Mapping[str, Launch], problem: Problem) -> Launch:
    """The launch of a problem's architecture; a table may leave out what is as on `DEFAULT`."""
    return table.get(problem.architecture, table[DEFAULT])


# What `launched_as` asks instead of the tables alone, innermost last.
_overrides: list[Callable] = []


def launched_as(table: Callable[[Problem], Any], problem: Problem) -> Any:
    """The launch, or tuple of launches, that ``table(problem)`` ships.

    Every launcher asks here, so that `overriding` can put other launches in the place of any.
    """
    launch = table(problem)
    for answer in _overrides:
        launch = answer(table, problem, launch)
    return launch


@contextlib.contextmanager
def overriding(answer: Callable[[Callable, Problem, Any], Any]) -> Iterator[None]:
    """Let ``answer(table, problem, shipped)`` say how kernels are launched meanwhile."""
    _overrides.append(answer)
    try:
        yield
    finally:
        _overrides.remove(answer)


def next_power_of_2(n: int) -> int:
    """The least power of 2 from ``n`` on; Triton's own function takes 3 us, in every launch."""
    return 1 << (n - 1).bit_length()


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which kernels are launched on ``device``, whichever is current."""
    if device.index is None:
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of `tl.dot`: float32 follows torch's setting for float32 products."""
    # the setting is of NVIDIA's products; most of AMD's GPUs have none like them
    follows_tf32 = dtype == torch.float32 and torch.version.hip is None
    return "tf32" if follows_tf32 and allows_tf32() else "ieee"
