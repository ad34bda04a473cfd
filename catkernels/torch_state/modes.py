"""What watches or changes every operation of a call, and how to compute in spite of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes

from catkernels.torch_state.transforms import is_tracing


def is_observed() -> bool:
    """Whether a trace or a mode sees every operation: a counter of FLOPs, one of the user's own.

    What `torch.device` and `torch.set_default_device` set only says where tensors are made.
    """
    functions = torch.overrides._get_current_function_mode_stack()
    return (
        is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or any(not isinstance(mode, DeviceContext) for mode in functions)
    )


@contextmanager
def plainly_on_cpu() -> Iterator[None]:
    """Within it, operations run at once, on the CPU unless told otherwise, in their own dtypes.

    No mode makes fake or counted tensors of them, no autocast or default device moves them, nothing
    is compiled, gradients can be taken, and PyTorch's generator of the CPU is put back in the end.
    """
    with ExitStack() as stack:
        for context in (
            _disable_current_modes(),
            torch.device("cpu"),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.random.fork_rng(devices=[]),
        ):
            stack.enter_context(context)
        # before its import nothing can have been compiled
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
