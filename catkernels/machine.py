"""What results and figures were computed on: device, versions, driver and clocks."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping

import torch

from catkernels.torch_state.device import TRITON_IS_INSTALLED, best_device

STATE = "power.limit,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"


def describe(cpu_name: str | None = None) -> dict[str, str | None]:
    """The device's name, the versions of everything between it and Python, and its clocks."""
    device = best_device()
    about = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    if version := triton_version():
        about["triton"] = version
    if device.type == "cpu":
        return about | {"device": cpu_name or "a CPU", "device_state": "one thread"}
    about |= {
        "device": torch.get_device_module(device).get_device_name(),
        "device_state": _nvidia_smi(STATE),
    }
    if device.type == "cuda" and torch.version.hip is None:
        from catkernels.kernels.compile_ahead import ptxas_version

        about |= {"driver": _nvidia_smi("driver_version"), "ptxas": ptxas_version()}
    return about


def is_same(stored: Mapping[str, object], about: Mapping[str, object]) -> bool:
    """Whether what a file says it was computed on is the device and versions of ``about``.

    The state is left out: it has the clocks, which are never the same.
    """
    return all(stored.get(name) == about[name] for name in about if name != "device_state")


def triton_version() -> str | None:
    """The version of the package that holds Triton, None where there is none.

    PyTorch's builds for AMD's and Intel's GPUs call theirs otherwise.
    """
    if not TRITON_IS_INSTALLED:
        return None
    packages = importlib.metadata.packages_distributions().get("triton")
    return importlib.metadata.version(packages[0]) if packages else None


def _nvidia_smi(query: str) -> str:
    """What NVIDIA's tool answers, a GPU a line."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown: {error}"
