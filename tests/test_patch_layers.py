"""Patching models whose layers carry hooks, parametrisations or quantised weights."""

from __future__ import annotations

import pytest
import torch
from patch_cases import build, run
from torch import nn

from catkernels.patching.patch import patch, unpatch

PLACES = ["block", "norm1", "mlp.fc1"] + [
    f"attn{part}" for part in ("", ".qkv", ".proj", ".softmax", ".attn_drop", ".proj_drop")
]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("blocks", ["pre_ipsa_blocks", "cpsa_blocks"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_fire(where, blocks, when):
    model, images = build()
    model.eval()
    calls = []

    def hook():
        block = getattr(model.layers[0], blocks)[0]
        module = block if where == "block" else block.get_submodule(where)
        return module.register_forward_hook(lambda module, args, output: calls.append(output.shape))

    if when == "before":
        handle = hook()
        expected = run(model, images)
        report = patch(model)
    else:
        expected = run(model, images)
        report = patch(model)
        handle = hook()
    calls.clear()
    torch.testing.assert_close(run(model, images), expected)
    assert len(calls) == 1
    if when == "before" and where in ("attn.qkv", "attn.proj"):
        assert where.removeprefix("attn.") in str(report)
    if when == "before" and where in ("attn", "attn.softmax", "attn.attn_drop"):
        assert "its attention carries hooks" in str(report)
    handle.remove()
    run(model, images)
    assert len(calls) == 1


def test_backward_hooks_on_a_block_fire():
    model, images = build()
    calls = []
    model.layers[0].cpsa_blocks[0].register_full_backward_hook(lambda *_: calls.append(1))
    patch(model)
    run(model, images)[0].sum().backward()
    assert calls == [1]


def test_backward_hooks_set_while_patched_outlive_it():
    model, images = build()
    calls = []
    patch(model)
    model.layers[0].cpsa_blocks[0].register_full_backward_hook(lambda *_: calls.append(1))
    unpatch(model)
    run(model, images)[0].sum().backward()
    assert calls == [1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantised_and_scripted_parts_do_not_stop_the_rest():
    model, images = build()
    model.eval()
    for blocks in ("pre_ipsa_blocks", "cpsa_blocks"):
        attn = getattr(model.layers[0], blocks)[0].attn
        weight, bias = attn.qkv.weight.detach(), attn.qkv.bias.detach()
        attn.qkv = Buffered(weight, bias)
    model.head = torch.jit.script(model.head)
    expected = run(model, images)
    assert len(patch(model).swapped) == 6
    torch.testing.assert_close(run(model, images), expected)


class Quantised(torch.Tensor):
    """A weight in bytes with a scale, which linear layers alone know what to do with."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            x, weight, bias = args
            return nn.functional.linear(x, weight.values * weight.scale, bias)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(operator)


def test_quantised_weights_stay_with_their_linear_layers():
    model, images = build()
    model.eval()
    for linear in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        scale = linear.weight.detach().abs().max() / 127
        weight = Quantised((linear.weight.detach() / scale).round().to(torch.int8), scale)
        linear.weight = nn.Parameter(weight, requires_grad=False)
    with torch.no_grad():
        expected = run(model, images)
        report = patch(model)
        torch.testing.assert_close(run(model, images), expected)
    assert len(report.swapped) == 6
    assert all("qkv goes through its own forward" in block.reason for block in report.blocks)


class Buffered(nn.Module):
    """A linear layer without parameters, as quantisation leaves them."""

    def __init__(self, weight, bias):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


def test_parametrised_and_adapted_layers_are_honoured():
    model, images = build()
    model.eval()
    for blocks in ("pre_ipsa_blocks", "cpsa_blocks"):
        torch.nn.utils.parametrizations.weight_norm(getattr(model.layers[0], blocks)[0].attn.qkv)
    expected = run(model, images)
    report = patch(model)
    assert len(report.swapped) == 6
    torch.testing.assert_close(run(model, images), expected)
    served = {block.name: block for block in report.blocks}
    assert "qkv goes through its own forward" in served["layers.0.pre_ipsa_blocks.0"].reason
    assert "qkv is intercepted" in served["layers.0.cpsa_blocks.0"].reason
