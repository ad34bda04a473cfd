"""The functions: backends, dtypes, strides, and errors that say what to do."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import catkernels
from catkernels.accuracy import assert_within_error_budget
from catkernels.cases import Shape, make_cpsa_inputs, make_ipsa_inputs

SHAPE = Shape("padded", batch=2, height=9, width=16, channels=12, num_heads=3)


def ipsa(inputs, shape=SHAPE, function=catkernels.ipsa_attention, **options):
    return function(**inputs, num_heads=shape.num_heads, patch_size=shape.patch_size, **options)


def cpsa(inputs, shape=SHAPE, function=catkernels.cpsa_attention, **options):
    return function(**inputs, patch_size=shape.patch_size, **options)


def to(inputs, dtype):
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}


ATTENTIONS = {
    "ipsa": (ipsa, make_ipsa_inputs),
    "cpsa": (cpsa, make_cpsa_inputs),
}
both = pytest.mark.parametrize("attention", ATTENTIONS)


@both
def test_maps_without_pixels(attention):
    call, make_inputs = ATTENTIONS[attention]
    for height, width in ((0, 7), (7, 0), (0, 0)):
        shape = Shape("nothing", batch=2, height=height, width=width, channels=6, num_heads=2)
        assert call(make_inputs(shape), shape).shape == (2, height, width, 6)


@both
def test_forward_mode_differentiation(attention):
    call, make_inputs = ATTENTIONS[attention]
    inputs = to(make_inputs(SHAPE), torch.float64)
    name = next(iter(inputs))
    x = inputs.pop(name)
    direction = torch.randn_like(x)
    _, forward = torch.func.jvp(lambda x: call({name: x, **inputs}), (x,), (direction,))
    x.requires_grad_()
    output = call({name: x, **inputs})
    cotangent = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, x, cotangent)
    torch.testing.assert_close((forward * cotangent).sum(), (gradient * direction).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), direction)
        output = call({name: dual, **inputs})
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(output).tangent, forward)


@both
def test_strides_do_not_matter(attention):
    call, make_inputs = ATTENTIONS[attention]
    inputs = make_inputs(SHAPE)
    name = next(iter(inputs))
    expected = call(inputs)
    x = inputs[name]
    variants = {
        "NCHW permuted": x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "a slice": torch.cat([x, x], -1)[..., : x.shape[-1]],
    }
    for variant in variants.values():
        assert not variant.is_contiguous()
        torch.testing.assert_close(call({**inputs, name: variant}), expected)


@both
def test_expanded_gradients(attention):
    call, make_inputs = ATTENTIONS[attention]
    inputs = {name: tensor.requires_grad_() for name, tensor in make_inputs(SHAPE).items()}
    tensors = tuple(inputs.values())
    expanded = torch.autograd.grad(call(inputs).sum(), tensors)
    written = torch.autograd.grad(call(inputs), tensors, torch.ones(2, 9, 16, 12))
    for one, other in zip(expanded, written, strict=True):
        assert torch.equal(one, other)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_computes_in_half_and_gives_gradients_in_the_parameters_dtype(attention, dtype):
    call, make_inputs = ATTENTIONS[attention]
    inputs = {name: tensor.requires_grad_() for name, tensor in make_inputs(SHAPE).items()}
    with torch.autocast("cpu", dtype):
        output = call(inputs)
    assert output.dtype == dtype
    output.float().sum().backward()
    for name, tensor in inputs.items():
        assert tensor.grad.dtype == torch.float32, name
    with torch.autocast("cpu", dtype):
        assert call(to(inputs, torch.float64)).dtype == torch.float64


def test_half_qkv_with_a_float32_table():
    inputs = make_ipsa_inputs(SHAPE, torch.bfloat16, table_dtype=torch.float32)
    output = ipsa(inputs)
    assert output.dtype == torch.bfloat16
    truth = ipsa(to(inputs, torch.float64))
    assert_within_error_budget(output, ipsa(to(inputs, torch.bfloat16)), truth)


@both
def test_dropout_repeats_under_checkpointing(attention):
    """The first pass runs without gradients, the second with: both must drop the same weights."""
    call, make_inputs = ATTENTIONS[attention]
    inputs = make_inputs(Shape("images", 6, 14, 14, 12, 3))
    name = next(iter(inputs))
    x = inputs.pop(name).requires_grad_()
    torch.manual_seed(1)
    with torch.no_grad():
        first = call({name: x, **inputs}, dropout_p=0.3)
    torch.manual_seed(1)
    assert torch.equal(call({name: x, **inputs}, dropout_p=0.3), first)


@both
def test_unsupported_reasons_takes_the_call_itself(attention):
    call, make_inputs = ATTENTIONS[attention]
    inputs = make_inputs(SHAPE, torch.float64)
    reasons = call(inputs, function=partial(catkernels.unsupported_reasons, public(attention)))
    assert reasons
    with pytest.raises(ValueError, match="cannot use backend='triton'") as error:
        call(inputs, backend="triton")
    assert all(reason in str(error.value) for reason in reasons)


def public(attention):
    return getattr(catkernels, f"{attention}_attention")


@both
def test_attention_maps_are_only_for_the_reference(attention):
    call, make_inputs = ATTENTIONS[attention]
    output, weights = call(make_inputs(SHAPE), return_attention=True)
    assert output.shape == (2, 9, 16, 12)
    assert weights.shape == {"ipsa": (2, 6, 3, 49, 49), "cpsa": (2, 12, 6, 6)}[attention]
    with pytest.raises(ValueError, match="return_attention"):
        call(make_inputs(SHAPE), return_attention=True, backend="triton")


def test_unsupported_reasons_of_something_else():
    with pytest.raises(ValueError, match="ipsa_attention or cpsa_attention"):
        catkernels.unsupported_reasons(print)
