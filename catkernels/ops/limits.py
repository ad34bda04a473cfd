"""What kernels of several operators serve, and the sentences that refuse the rest."""

from __future__ import annotations

import torch

from catkernels.torch_state.device import device_reasons

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HALF_DTYPES = (torch.float16, torch.bfloat16)
MAX_PATCH_SIZE = 8


def map_reasons(device: torch.device, dtype: torch.dtype, patch_size: int) -> list[str]:
    """Why no kernel could attend in patches of a map; empty where one could.

    Args:
        dtype: what the call computes with and returns.
    """
    reasons = device_reasons(device)
    if dtype not in DTYPES:
        reasons.append(f"the kernels compute in float16, bfloat16 and float32, not in {dtype}")
    if patch_size > MAX_PATCH_SIZE:
        reasons.append(f"the kernels take patch sizes up to {MAX_PATCH_SIZE}, not {patch_size}")
    return reasons


def tensor_reasons(dtypes: set[torch.dtype]) -> list[str]:
    """Why kernels cannot read tensors of these dtypes; empty where they can."""
    if others := sorted(str(dtype) for dtype in dtypes.difference(DTYPES)):
        return [f"the kernels take float16, bfloat16 and float32, not {' and '.join(others)}"]
    return []


def half_product_reasons(products: torch.dtype) -> list[str]:
    """Why kernels that multiply in half precision alone cannot do so in this dtype."""
    if products in HALF_DTYPES:
        return []
    return [f"the kernels multiply in half precision, not in {products}"]


def one_of(channels: tuple[int, ...]) -> str:
    """The channels that a kernel takes, in words."""
    return f"{', '.join(map(str, channels[:-1]))} or {channels[-1]}"
