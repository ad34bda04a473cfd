"""What a figure was measured on: device, versions, driver and clocks."""

from __future__ import annotations

import importlib.metadata
import subprocess

import torch

from benchmarks.clock import DEVICE

GPU_QUERY = "driver_version,power.limit,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"


def describe(cpu_name: str) -> dict[str, str | None]:
    """The device's name, the versions of everything between it and Python, and its clocks."""
    about = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if DEVICE.type == "cpu":
        return about | {"device": cpu_name, "device_state": "one thread"}
    about |= {
        "device": torch.get_device_module(DEVICE).get_device_name(),
        "device_state": _gpu_state(),
        "triton": importlib.metadata.version("triton"),
    }
    if DEVICE.type == "cuda" and torch.version.hip is None:
        from triton import knobs

        about["ptxas"] = knobs.nvidia.ptxas.version
    return about


def _gpu_state() -> str:
    """Driver, power limit and clocks, as far as NVIDIA's tool tells them."""
    command = ["nvidia-smi", f"--query-gpu={GPU_QUERY}", "--format=csv"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown: {error}"
