"""What a tensor is made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from catkernels.torch_state.modes import is_observed
from catkernels.torch_state.transforms import is_transformed

# What most tensors are; to look for an attribute that they lack takes longer.
_PLAIN = (Tensor, nn.Parameter)


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor is made of others, such as quantised values or the shards of processes."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "__tensor_flatten__")


def values_can_be_read(tensor: Tensor) -> bool:
    """Whether a tensor has values of its own here, which no mode or transform stands for."""
    plain = type(tensor) in _PLAIN and not tensor.is_meta
    return plain and not (is_transformed() or is_observed())


def version(tensor: Tensor) -> int:
    """How often a tensor was written to, as far as that is counted and worth looking at.

    What was made in inference mode has no count. DDP writes every buffer before every call: to look
    at each time what it has written would let a GPU wait for the host.
    """
    if tensor.is_inference() or (tensor.device.type != "cpu" and _has_processes()):
        return 0
    return tensor._version


def _has_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
