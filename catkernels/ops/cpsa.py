"""CPSA as an operator; its kernels are still to come."""

from __future__ import annotations

import torch
from torch import Tensor

from catkernels.ops.device import device_reasons


def unsupported_reasons(*, device: torch.device, **_) -> list[str]:
    return [*device_reasons(device), "the CPSA kernels are not part of this version"]


def cpsa_attention(*_, **__) -> Tensor:
    raise NotImplementedError
