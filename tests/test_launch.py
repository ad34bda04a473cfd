"""Which launches and which float32 products a device gets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("backend", "arch", "row"),
    [
        ("cuda", 80, "sm_80"),
        ("cuda", 89, "sm_80"),
        ("cuda", 90, "sm_90"),
        ("cuda", 100, "sm_100"),
        ("cuda", 120, "sm_80"),
        ("hip", "gfx90a", "gfx9"),
        ("hip", "gfx942", "gfx9"),
        ("hip", "gfx1100", "sm_80"),
        # as Intel's driver describes a device
        ("xpu", {"architecture": 1, "max_work_group_size": 1024}, "sm_80"),
    ],
    ids=str,
)
def test_every_device_has_its_row(backend, arch, row, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget

    from catkernels.kernels import launch

    target = GPUTarget(backend, arch, 64 if row == launch.CDNA else 32)
    driver = SimpleNamespace(get_current_target=lambda: target)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    # past the cache, which must not hold a made-up device
    assert launch.architecture.__wrapped__(torch.device("cuda", 0)) == row


def test_float32_follows_the_precision_setting(monkeypatch):
    from catkernels.kernels import launch

    assert launch.dot_precision(torch.float32) == "ieee"
    torch.set_float32_matmul_precision("high")
    try:
        assert launch.dot_precision(torch.float32) == "tf32"
        assert launch.dot_precision(torch.float16) == "ieee"
        monkeypatch.setattr(torch.version, "hip", "6.4")
        assert launch.dot_precision(torch.float32) == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_next_power_of_2():
    import triton

    from catkernels.kernels import launch

    for n in range(1, 130):
        assert launch.next_power_of_2(n) == triton.next_power_of_2(n)
