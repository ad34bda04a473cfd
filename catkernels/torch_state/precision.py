"""In which precision PyTorch asks to compute."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from catkernels.torch_state.graphs import constant_in_graphs


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that `torch.nn.functional.linear` would compute with, autocast considered."""
    if x.dtype != torch.float64 and autocast_is_on(x.device):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def autocast_is_on(device: torch.device) -> bool:
    """Whether this is an autocast region for tensors of ``device``."""
    return _knows_autocast(device.type) and torch.is_autocast_enabled(device.type)


@constant_in_graphs  # which cannot ask
def _knows_autocast(device_type: str) -> bool:
    """Whether there is autocast for a type of device; where there is none, asking for it raises."""
    return _looked_up_autocast(device_type)


@functools.cache  # asked several times in every call
def _looked_up_autocast(device_type: str) -> bool:
    return torch.amp.autocast_mode.is_autocast_available(device_type)


@constant_in_graphs  # which cannot ask
def allows_tf32() -> bool:
    """Whether torch's setting for float32 products allows TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
