"""Whether somebody watches the operations of a call."""

from __future__ import annotations

import torch
from torch.utils._device import DeviceContext


def is_observed() -> bool:
    """Whether a mode sees every operation: a counter of FLOPs, a tracer, one of the user's own.

    What `torch.device` and `torch.set_default_device` set only says where tensors are made.
    """
    functions = torch.overrides._get_current_function_mode_stack()
    return torch._C._len_torch_dispatch_stack() > 0 or any(
        not isinstance(mode, DeviceContext) for mode in functions
    )
