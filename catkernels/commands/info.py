"""Versions and devices, and what would serve both attentions on each of these."""

from __future__ import annotations

import platform

import torch

import catkernels
from catkernels.machine import triton_version
from catkernels.ops import cpsa, ipsa
from catkernels.torch_state.device import KERNEL_DEVICES, interpreting

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def run() -> None:
    """Print them."""
    version = triton_version()
    triton = f"triton {version}" if version else "Triton is not installed"
    print(f"catkernels {catkernels.__version__}, torch {torch.__version__}, {triton}")
    print(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    devices = [torch.device("cpu")]
    for kind in KERNEL_DEVICES:
        count = torch.get_device_module(kind).device_count()
        devices += [torch.device(kind, index) for index in range(count)]
    for device in devices:
        print(f"\n{_device_name(device)}")
        _print_serving(device)


def _print_serving(device: torch.device) -> None:
    """What serves each attention in each dtype, those alike in one line, and the reasons below."""
    everything: list[str] = []
    for operation in ("ipsa", "cpsa"):
        served: dict[str, list[str]] = {}
        for dtype in DTYPES:
            reasons = _reasons(operation, device, dtype)
            everything += reasons
            served.setdefault("reference" if reasons else "triton", []).append(
                str(dtype).removeprefix("torch.")
            )
        for backend, dtypes in served.items():
            print(f"  {operation} {', '.join(dtypes)}: {backend}")
    for reason in dict.fromkeys(everything):
        print(f"  why not triton: {reason}")


def _reasons(operation: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why the kernels would not serve the attention of one of the paper's models in training."""
    if device.type == "cpu":
        # whatever else there is to say, this alone decides
        if interpreting():
            return ["on a CPU the kernels are only interpreted, where backend='triton' asks for it"]
        return [f"the kernels need a GPU ({' or '.join(KERNEL_DEVICES)})"]
    if operation == "ipsa":
        return ipsa.unsupported_reasons(device=device, dtype=dtype, patch_size=7, head_dim=32)
    return cpsa.unsupported_reasons(device=device, dtype=dtype, patch_size=7, num_patches=64)


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        mode = ", Triton's interpreter is on" if interpreting() else ""
        return f"cpu: {torch.get_num_threads()} threads{mode}"
    properties = torch.get_device_module(device).get_device_properties(device)
    return f"{device}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
