"""What the kernels of both attentions serve, and the sentences that refuse the rest."""

from __future__ import annotations

import torch

from catkernels.torch_state.device import device_reasons

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
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
