"""What results were computed on."""

from __future__ import annotations

import importlib.metadata

import torch

from catkernels import machine


def test_a_device_its_versions_and_its_state_are_named():
    about = machine.describe("a processor")
    assert about["torch"] == torch.__version__
    if "triton" in about:
        assert about["triton"] == importlib.metadata.version("triton")
    if not torch.cuda.is_available():
        assert (about["device"], about["device_state"]) == ("a processor", "one thread")
        assert about["cuda"] is None or "driver" not in about


def test_triton_is_found_in_a_package_of_another_name(monkeypatch):
    monkeypatch.setattr(machine, "TRITON_IS_INSTALLED", True)
    monkeypatch.setattr(
        importlib.metadata, "packages_distributions", lambda: {"triton": ["pytorch-triton-rocm"]}
    )
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"3.6.0 of {name}")
    assert machine.triton_version() == "3.6.0 of pytorch-triton-rocm"
    monkeypatch.setattr(importlib.metadata, "packages_distributions", dict)
    assert machine.triton_version() is None


def test_without_nvidias_tool_the_reason_stands_in_the_place_of_its_answer(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert machine._nvidia_smi("driver_version").startswith("unknown: ")
