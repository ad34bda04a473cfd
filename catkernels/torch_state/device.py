"""Whether Triton kernels can run on a device, and if not, why not. Triton is not imported here."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from catkernels.torch_state.graphs import constant_in_graphs


def _is_installed(package: str) -> bool:
    """Whether a package could be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


# Looked up once, on import: a compiled graph could not look it up.
TRITON_IS_INSTALLED = _is_installed("triton")
# The device types that Triton compiles for; ROCm's is "cuda" as well.
KERNEL_DEVICES = ("cuda", "xpu")
# The least compute capability of NVIDIA's GPUs that Triton compiles for.
LEAST_CAPABILITY = (8, 0)


def interpreting() -> bool:
    """Whether Triton's interpreter is on, which runs the kernels on a CPU, for testing."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def best_device() -> torch.device:
    """A device that Triton compiles for where one is visible, else the CPU."""
    for kind in KERNEL_DEVICES:
        if torch.get_device_module(kind).is_available():
            return torch.device(kind)
    return torch.device("cpu")


@constant_in_graphs
def multiplies_float32_matrices(device: torch.device) -> bool:
    """Whether a device has matrix instructions for exact float32 products, as AMD's CDNA has."""
    if torch.version.hip is None or device.type != "cuda":
        return False
    return torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx9")


def device_reasons(device: torch.device) -> list[str]:
    """Why Triton kernels cannot run on tensors of ``device``; empty where they can."""
    reasons = []
    if not TRITON_IS_INSTALLED:
        reasons.append("Triton is not installed")
    if device.type not in KERNEL_DEVICES and not (device.type == "cpu" and interpreting()):
        reasons.append(f"the tensors are on {device.type}, the kernels need cuda or xpu")
    capability = _cuda_capability(device)
    if capability is not None and capability < LEAST_CAPABILITY:
        found, least = (".".join(map(str, pair)) for pair in (capability, LEAST_CAPABILITY))
        reasons.append(f"the GPU has compute capability {found}, the kernels need {least}")
    return reasons


@constant_in_graphs
def _cuda_capability(device: torch.device) -> tuple[int, int] | None:
    """Of one of NVIDIA's GPUs that is here; None of any other device."""
    return _looked_up_capability(device) if device.type == "cuda" else None


@functools.cache  # PyTorch takes microseconds, in every call
def _looked_up_capability(device: torch.device) -> tuple[int, int] | None:
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)
