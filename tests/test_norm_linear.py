"""A norm and a linear layer that keep only the norm's input: the gradients, and when it serves."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

import catkernels
from catkernels import official
from catkernels.accuracy import assert_within_error_budget
from catkernels.modules import recomputes_norm
from catkernels.ops.norm_linear import norm_linear
from catkernels.parts import AttentionParts


def layers(norm_options=None, bias=True, dtype=torch.float32):
    """A norm over 6 channels whose weights matter, and a linear layer to 5."""
    norm, linear = nn.LayerNorm(6, **(norm_options or {})), nn.Linear(6, 5, bias=bias)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    return norm.to(dtype), linear.to(dtype)


OPTIONS = {
    "usual": {},
    "no bias of the linear layer": {"bias": False},
    "no bias of the norm": {"norm_options": {"bias": False}},
    "no weights of the norm": {"norm_options": {"elementwise_affine": False}},
    "another eps": {"norm_options": {"eps": 0.1}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_of_any_order(options):
    norm, linear = layers(**options, dtype=torch.float64)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    inputs = (x, *norm.parameters(), *linear.parameters())

    def call(x, *_):
        return norm_linear(x, norm, linear)

    torch.testing.assert_close(call(x), linear(norm(x)))
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_many_gradients_at_once():
    norm, linear = layers()
    x = torch.randn(2, 3, 6, requires_grad=True)
    leaves = (x, *norm.parameters(), *linear.parameters())
    cotangents = torch.randn(4, 2, 3, 5)
    together, expected = (
        torch.autograd.grad(output, leaves, cotangents, is_grads_batched=True)
        for output in (norm_linear(x, norm, linear), linear(norm(x)))
    )
    torch.testing.assert_close(together, expected)


@pytest.mark.parametrize("frozen", ["x", "norm", "linear", "all but x"])
def test_what_needs_no_gradient_gets_none(frozen):
    norm, linear = layers()
    x = torch.randn(4, 6, requires_grad=frozen != "x")
    norm.requires_grad_(frozen not in ("norm", "all but x"))
    linear.requires_grad_(frozen not in ("linear", "all but x"))
    tensors = (x, *norm.parameters(), *linear.parameters())
    leaves = [t for t in tensors if t.requires_grad]
    actual = torch.autograd.grad(norm_linear(x, norm, linear).square().sum(), leaves)
    expected = torch.autograd.grad(linear(norm(x)).square().sum(), leaves)
    torch.testing.assert_close(actual, expected)
    norm_linear(x, norm, linear).sum().backward()
    assert [t.grad is not None for t in tensors] == [t.requires_grad for t in tensors]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["autocast", "autocast of half", "half parameters"])
def test_in_half_precision(how, dtype):
    norm, linear = layers()
    x = torch.randn(50, 6)
    if how != "autocast":
        x = x.to(dtype)
    if how == "half parameters":
        norm.to(dtype), linear.to(dtype)
    modules = nn.Sequential(norm, linear)
    exact = deepcopy(modules).double()

    def run(call, modules, x):
        x = x.detach().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=x.dtype != torch.float64 and "autocast" in how):
            output = call(x)
        leaves = (x, *modules.parameters())
        gradients = torch.autograd.grad(output.double().square().sum(), leaves)
        assert [g.dtype for g in gradients] == [leaf.dtype for leaf in leaves]
        return output, *gradients

    actual = run(lambda x: norm_linear(x, norm, linear), modules, x)
    eager = run(modules, modules, x)
    double = run(exact, exact, x.double())
    for one, other, truth in zip(actual, eager, double, strict=True):
        assert one.dtype == other.dtype
        assert_within_error_budget(one, other, truth)


OBSTACLES = {
    "a hook on the norm": lambda block, x: block.norm1.register_forward_hook(lambda *_: None),
    "another norm": lambda block, x: setattr(block, "norm1", nn.RMSNorm(32)),
    "a norm over more than channels": lambda block, x: setattr(
        block, "norm1", nn.LayerNorm((49, 32), elementwise_affine=False)
    ),
    "a compiled norm": lambda block, x: block.norm1.compile(),
    "a compiled qkv": lambda block, x: block.attn.qkv.compile(),
    "a hook on qkv": lambda block, x: block.attn.qkv.register_forward_hook(lambda *_: None),
    "the reference": lambda block, x: setattr(block, "backend", "reference"),
    "nothing to differentiate": lambda block, x: (block.requires_grad_(False), x.detach_()),
    "parameters of another dtype": lambda block, x: block.norm1.double(),
}


@pytest.mark.parametrize("obstacle", OBSTACLES.values(), ids=OBSTACLES)
def test_only_plain_layers_before_the_kernels_are_joined(obstacle, device):
    block = catkernels.CATBlock(32, 2, backend="triton").to(device)
    x = torch.randn(1, 7, 7, 32, device=device, requires_grad=True)

    def joined():
        return recomputes_norm(AttentionParts.of(block.attn), x, 7, block.backend, block.norm1)

    assert joined()
    with torch.no_grad():
        assert not joined()
    obstacle(block, x)
    assert not joined()


class WideHeads(official.Attention):
    """Heads that are wider than a share of the channels, as a downstream copy may have them."""

    def __init__(self, dim, num_heads, head_dim):
        super().__init__(num_heads * head_dim, (7, 7), num_heads)
        self.qkv = nn.Linear(dim, 3 * num_heads * head_dim)
        self.proj = nn.Linear(num_heads * head_dim, dim)


def test_heads_need_not_share_the_channels(device, launches):
    block = official.CATBlock(
        40, (7, 14), 2, 7, 4.0, True, None, 0.0, 0.0, 0.0, nn.LayerNorm, "ipsa"
    )
    block.attn = WideHeads(40, num_heads=2, head_dim=32)
    model = nn.Sequential(block).to(device)
    x = torch.randn(1, 98, 40, device=device)
    exact = deepcopy(model).double()
    expected = [
        (m(y), *torch.autograd.grad(m(y).square().sum(), tuple(m.parameters())))
        for m, y in ((model, x), (exact, x.double()))
    ]
    report = catkernels.patch(model, backend="triton")
    assert report.blocks[0].backend == "triton"
    output = model(x)
    gradients = torch.autograd.grad(output.square().sum(), tuple(model.parameters()))
    assert launches["ipsa_backward_kernel"]
    for actual, same, double in zip((output, *gradients), *expected, strict=True):
        assert_within_error_budget(actual, same, double)


def test_a_listener_on_the_attention_hears_its_call(device):
    """The block then calls the attention, which is given the normed map."""
    block = catkernels.CATBlock(32, 2, backend="triton").to(device)
    x = torch.randn(1, 7, 7, 32, device=device, requires_grad=True)
    expected, heard = block(x), []
    block.attn.register_forward_hook(lambda module, args, output: heard.append(args[0]))
    torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(heard, [block.norm1(x)])
