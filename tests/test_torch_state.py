"""What `catkernels.torch_state` reads of PyTorch."""

from __future__ import annotations

from contextlib import suppress

import pytest
from torch import nn, ones

from catkernels.torch_state import hooks

REGISTRATIONS = [
    "register_forward_pre_hook",
    "register_forward_hook",
    "register_full_backward_pre_hook",
    "register_full_backward_hook",
]


def double(module, values, *outputs):
    return (2 * values[0],) if not outputs else 2 * outputs[0]


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


@pytest.mark.parametrize("registration", REGISTRATIONS[:2])
def test_hooks_set_aside_come_back_whatever_happens(registration):
    model = nn.Sequential(nn.Identity())
    handle = getattr(model[0], registration)(double)
    with suppress(ZeroDivisionError), hooks.hooks_set_aside(model):
        assert model(ones(1)) == 1
        raise ZeroDivisionError
    assert model(ones(1)) == 2
    handle.remove()
    assert model(ones(1)) == 1
