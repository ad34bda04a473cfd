"""In which precision PyTorch asks to compute."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that `torch.nn.functional.linear` would compute with, autocast considered."""
    if x.dtype != torch.float64 and autocast_is_on(x.device):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def autocast_is_on(device: torch.device) -> bool:
    """Whether this is an autocast region for tensors of ``device``."""
    return _knows_autocast(device.type) and torch.is_autocast_enabled(device.type)


def _knows_autocast(device_type: str) -> bool:
    """Whether there is autocast for a type of device; where there is none, asking for it raises."""
    return torch.amp.is_autocast_available(device_type)


def allows_tf32() -> bool:
    """Whether torch's setting for float32 products allows TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# What `torch.compiler.assume_constant_result` does, which would import the compiler: a graph cannot
# ask for either, and so keeps the answer of when it was made.
_knows_autocast._dynamo_marked_constant = True
allows_tf32._dynamo_marked_constant = True
