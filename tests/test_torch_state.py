"""What `catkernels.torch_state` reads of PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from catkernels.torch_state import hooks, modes

REGISTRATIONS = [
    "register_forward_pre_hook",
    "register_forward_hook",
    "register_full_backward_pre_hook",
    "register_full_backward_hook",
]


@pytest.mark.parametrize("registration", REGISTRATIONS)
def test_a_module_with_a_hook_is_intercepted(registration):
    module = nn.Linear(1, 1)
    assert not hooks.is_intercepted(module)
    handle = getattr(module, registration)(lambda *arguments: None)
    assert hooks.is_intercepted(module)
    handle.remove()
    assert not hooks.is_intercepted(module)


def test_a_module_compiled_by_itself_is_intercepted():
    module = nn.Linear(1, 1)
    module.compile(backend="eager")
    assert hooks.is_compiled(module)
    assert hooks.is_intercepted(module)


def test_a_module_with_a_forward_of_its_own_is_intercepted():
    module = nn.Linear(1, 1)
    module.forward = lambda x: x
    assert hooks.is_intercepted(module)


@pytest.mark.parametrize("registration", REGISTRATIONS)
def test_shared_hooks_are_removed_by_their_handles(registration):
    source, target = nn.Identity(), nn.Identity()
    handle = getattr(source, registration)(lambda *arguments: None)
    hooks.share_hooks(source, target)
    assert hooks.is_intercepted(target)
    handle.remove()
    assert not hooks.is_intercepted(target)


CONTEXTS = {
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "meta device": lambda: torch.device("meta"),
    "fake tensors": FakeTensorMode,
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_plainly_means_plainly(context):
    state = torch.get_rng_state()
    with CONTEXTS[context](), modes.plainly_on_cpu():
        x = torch.rand(2, 2, requires_grad=True)
        y = x @ x
        y.sum().backward()
        assert (y.dtype, y.device.type, type(y)) == (torch.float32, "cpu", torch.Tensor)
        assert y.isfinite().all()
        assert x.grad is not None
    assert torch.equal(torch.get_rng_state(), state)


def test_plainly_nothing_is_compiled():
    def fail(*arguments):
        raise AssertionError("compiled")

    function = torch.compile(lambda x: x + 1, backend=fail)
    with modes.plainly_on_cpu():
        assert function(torch.ones(1)) == 2
