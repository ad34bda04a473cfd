"""How kernels are launched: with which resources, on which device, at which precision."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton

# Architectures that want launches of their own; every other device takes `DEFAULT`'s.
AMPERE, HOPPER, BLACKWELL, CDNA = "sm_80", "sm_90", "sm_100", "gfx9"
DEFAULT = AMPERE


@dataclass(frozen=True)
class Launch:
    """The resources of one kernel launch."""

    num_warps: int
    num_stages: int


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


def pick(table: Mapping[str, Launch], device: torch.device) -> Launch:
    """The launch of ``device``'s architecture; a table may leave out what is as on `DEFAULT`."""
    return table.get(architecture(device), table[DEFAULT])


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which kernels are launched on ``device``, whichever is current."""
    if device.index is None:
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of `tl.dot`: float32 follows torch's setting for float32 products."""
    # the setting is of NVIDIA's products; most of AMD's GPUs have none like them
    follows_tf32 = dtype == torch.float32 and torch.version.hip is None
    return (
        "tf32" if follows_tf32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    )
