"""Function transforms and forward-mode differentiation: by the kernels, or else by the reference.

The kernels are differentiated backwards, and not in batches. What more is asked for the reference
gives, and ``backend="triton"`` says so.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jvp, linearize, vmap

import catkernels
from catkernels import choice
from catkernels.cases import Shape, make_cpsa_inputs, make_ipsa_inputs

pytest.importorskip("triton")

# padded, so that IPSA's qkv bias is in the result
SHAPE = Shape("padded", batch=1, height=3, width=4, channels=16, num_heads=1, patch_size=2)


def ipsa(qkv, bias_table, qkv_bias, *, call=catkernels.ipsa_attention, **options):
    return call(qkv, bias_table, num_heads=1, patch_size=2, qkv_bias=qkv_bias, **options)


def cpsa(*tensors, call=catkernels.cpsa_attention, **options):
    return call(*tensors, patch_size=2, **options)


FUNCTIONS = {
    "ipsa": (ipsa, make_ipsa_inputs, catkernels.ipsa_attention),
    "cpsa": (cpsa, make_cpsa_inputs, catkernels.cpsa_attention),
}
both = pytest.mark.parametrize("name", FUNCTIONS)
eager_and_compiled = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """Let "auto" choose the kernels wherever they can serve, interpreted ones as well."""
    choose = choice.choose_kernels

    def chosen(function, backend, device, reasons):
        return choose(function, backend, torch.device("cuda"), reasons)

    monkeypatch.setattr(choice, "choose_kernels", chosen)


def make_call(name: str, device: torch.device, dtype: torch.dtype = torch.float32):
    """An attention of tensors alone, those tensors, and a direction for the map among them."""
    function, make_inputs, _ = FUNCTIONS[name]
    inputs = list(make_inputs(SHAPE, dtype, device).values())
    return function, inputs, torch.randn_like(inputs[0])


def in_one_graph(function, compiled: bool):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function


def tangent_by_jvp(function, x, direction):
    return jvp(function, (x,), (direction,))[1]


def tangent_by_dual_level(function, x, direction):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, direction))).tangent


def tangent_by_linearize(function, x, direction):
    return linearize(function, x)[1](direction)


def tangent_in_one_graph(function, x, direction):
    return in_one_graph(partial(tangent_by_jvp, function), True)(x, direction)


TANGENTS = (
    tangent_by_jvp,
    tangent_by_dual_level,
    tangent_by_linearize,
    tangent_in_one_graph,
)


@both
@pytest.mark.parametrize("tangent", TANGENTS)
@pytest.mark.parametrize(
    "trained", [False, pytest.param(True, marks=pytest.mark.full)], ids=["frozen", "trained"]
)
def test_tangents_are_the_references(name, trained, tangent, device):
    function, (x, *others), direction = make_call(name, device)
    for tensor in others:
        tensor.requires_grad_(trained)

    def call(x, **options):
        return function(x, *others, **options)

    expected = tangent_by_jvp(partial(call, backend="reference"), x, direction)
    torch.testing.assert_close(tangent(call, x, direction), expected)


@both
def test_forward_mode_is_refused_by_name(name, device):
    function, (x, *others), direction = make_call(name, device)
    *_, public = FUNCTIONS[name]

    def reasons(x, *others, **options):
        assert catkernels.unsupported_reasons(public, x, *others, **options) == [
            "forward-mode differentiation: the kernels only have a backward pass"
        ]
        return x

    jvp(lambda x: function(x, *others, call=reasons), (x,), (direction,))
    with pytest.raises(ValueError, match=r"forward-mode differentiation.*or 'reference'"):
        jvp(lambda x: function(x, *others, backend="triton"), (x,), (direction,))


@both
@eager_and_compiled
def test_gradients_of_each_sample_are_the_references(name, compiled, device):
    function, (x, *others), _ = make_call(name, device)
    samples = torch.stack([x, 2 * x])

    def of_each_sample(backend):
        def loss(x):
            return function(x, *others, backend=backend).square().sum()

        return vmap(grad(loss))

    actual = in_one_graph(of_each_sample("auto"), compiled)(samples)
    torch.testing.assert_close(actual, of_each_sample("reference")(samples))
    with pytest.raises(ValueError, match=r"torch\.func\.vmap.*or 'reference'"):
        of_each_sample("triton")(samples)


@both
def test_vmap_without_gradients_is_the_kernels(name, device, launches):
    function, (x, *others), _ = make_call(name, device)
    samples = torch.stack([x, 2 * x])
    actual = vmap(lambda x: function(x, *others))(samples)
    assert torch.equal(actual, torch.stack([function(x, *others) for x in samples]))


@both
@eager_and_compiled
def test_gradients_of_each_argument_are_the_kernels(name, compiled, device, launches):
    # in float32 a GPU leaves CPSA's backward pass to the reference
    function, inputs, _ = make_call(name, device, torch.float16)

    def loss(*inputs):
        return function(*inputs).float().square().sum()

    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    count = sum(launches.values())
    for argument, gradient in enumerate(expected):
        # the argument alone: what else needs a gradient would lead to the kernels by itself
        actual = in_one_graph(grad(loss, argument), compiled)(*inputs)
        torch.testing.assert_close(actual, gradient)
    assert sum(launches.values()) > count


@both
def test_second_derivatives_forward_over_backward_are_the_references(name, device):
    function, (x, *others), _ = make_call(name, device)

    def second(backend):
        corner = x[:, :1, :1].clone()
        return hessian(lambda x: function(x, *others, backend=backend).square().sum())(corner)

    torch.testing.assert_close(second("auto"), second("reference"))


@both
def test_blocks(name, device):
    """Whose norm is only computed again by IPSA's kernels."""
    block = catkernels.CATBlock(16, 1, patch_size=2, attn_type=name).to(device)
    images = torch.randn(2, 4, 4, 16, device=device)

    def loss(parameters, image):
        return functional_call(block, parameters, (image[None],)).square().sum()

    def results():
        parameters = {name: p.detach() for name, p in block.named_parameters()}
        samples = vmap(grad(loss), (None, 0))(parameters, images)
        return {**samples, "jacobian": jacfwd(lambda x: block(x[:1]).sum((1, 2)))(images)}

    block.backend = "auto"
    actual = results()
    block.backend = "reference"
    torch.testing.assert_close(actual, results())
