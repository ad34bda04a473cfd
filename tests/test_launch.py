"""Which launches and which float32 products a device gets, and on what tensors they run where."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import catkernels
from catkernels.ops import operator

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


# where the operators take tensors on a CPU, and nothing but launches is looked at
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels do run here")


class Watching(TorchDispatchMode):
    """What is called of PyTorch and of ours, with the arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.calls.append((function, arguments))
        return function(*arguments, **(options or {}))

    def ours(self):
        return {f._opname: arguments for f, arguments in self.calls if f.namespace == "catkernels"}


def every_operator(monkeypatch, launch):
    """A call of each operator of ours: its name, and arguments with real tensors on the CPU.

    Kernels are not run; ``launch`` is called in their place.
    """
    from catkernels.kernels.tiles import dot as any_jit_function

    monkeypatch.setattr(type(any_jit_function), "run", launch)
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        for attention in ("ipsa", "cpsa"):
            block = catkernels.CATBlock(32, 2, attn_type=attention, backend="triton").to(dtype)
            with Watching() as watching:
                x = torch.randn(2, 14, 14, 32, dtype=dtype, requires_grad=True)
                block(x).backward(torch.ones_like(x))
                with torch.no_grad():
                    # where CPSA joins its norm
                    block.eval()(x)
            found |= watching.ours()
    assert found.keys() == operator._implementations.keys()
    return found


def moved(tensor, device):
    """A fake tensor of the same kind there."""
    options = {"dtype": tensor.dtype, "device": device}
    return torch.empty_strided(tensor.shape, tensor.stride(), **options)


@interpreted
def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    """Whichever is the current one: it is made the current one, and all memory is of it."""
    current, ran_on = [], []

    @contextlib.contextmanager
    def made_current(device):
        current.append(device)
        yield
        current.pop()

    def launch(kernel, *arguments, **options):
        tensors = [t for t in pytree.tree_leaves((arguments, options)) if torch.is_tensor(t)]
        ran_on.append((kernel.__name__, current[-1:], {t.device for t in tensors}))

    calls = every_operator(monkeypatch, launch)
    assert all(not made for _, made, _ in ran_on), "a CPU has no device to be made the current one"
    ran_on.clear()
    # newer versions of PyTorch ask whether fake tensors may be there
    modules = SimpleNamespace(device=made_current, is_available=lambda: True)
    monkeypatch.setattr(torch, "get_device_module", lambda device: modules)
    second = torch.device("cuda", 1)
    with FakeTensorMode():
        for name, arguments in calls.items():
            there = pytree.tree_map_only(torch.Tensor, lambda t: moved(t, second), arguments)
            operator._implementations[name](*there)
    assert len(ran_on) >= len(calls)
    for name, made, devices in ran_on:
        assert made == [second], name
        assert devices == {second}, name


@interpreted
@pytest.mark.parametrize("attention", ["ipsa", "cpsa"])
@pytest.mark.parametrize("layout", ["NHWC", "channels-last NCHW"])
def test_plain_maps_are_not_copied(attention, layout, monkeypatch):
    """The kernels get the very memory that a block is given."""
    from catkernels.kernels.tiles import dot as any_jit_function

    launched = []
    monkeypatch.setattr(
        type(any_jit_function),
        "run",
        lambda kernel, *arguments, **options: launched.append((arguments, options)),
    )
    block = catkernels.CATBlock(32, 2, attn_type=attention, backend="triton").bfloat16()
    x = torch.randn(2, 14, 14, 32, dtype=torch.bfloat16)
    if layout != "NHWC":
        x = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        x = x.permute(0, 2, 3, 1)
    with Watching() as watching:
        block(x.requires_grad_())
    first = [t.data_ptr() for t in pytree.tree_leaves(launched[0]) if torch.is_tensor(t)]
    assert x.data_ptr() in first
    copied = [
        function
        for function, arguments in watching.calls
        if function._opname in ("clone", "_to_copy", "copy_", "contiguous")
        and arguments[0].numel() >= x.numel()
    ]
    assert not copied
