"""What a tensor is made of."""

from __future__ import annotations

from torch import Tensor


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor is made of others, such as quantised values or the shards of processes."""
    return hasattr(tensor, "__tensor_flatten__")
