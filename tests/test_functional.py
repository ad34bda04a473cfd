"""The functions: backends, dtypes, strides, and errors that say what to do."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import catkernels
from catkernels import reference
from catkernels.accuracy import assert_within_error_budget
from catkernels.arguments import check_patch_size
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


IPSA_ERRORS = {
    "qkv is no tensor": ({"qkv": [1.0]}, TypeError, r"qkv must be a tensor .* got list"),
    "qkv of integers": (
        {"qkv": torch.ones(1, 7, 7, 36, dtype=torch.int32)},
        TypeError,
        "qkv must be a floating-point tensor, got torch.int32",
    ),
    "rank 3": ({"qkv": torch.ones(7, 7, 36)}, ValueError, r"\(B, H, W, 3C\), got \(7, 7, 36\)"),
    "channels": (
        {"qkv": torch.ones(1, 7, 7, 37)},
        ValueError,
        r"\(B, H, W, 3C\), .* of a map of C channels, .* got 37 channels",
    ),
    "a map for qkv": (
        {"qkv": torch.ones(1, 7, 7, 36), "qkv_bias": torch.ones(108)},
        ValueError,
        r"qkv_bias must be \(3C,\) where qkv is \(B, H, W, 3C\) = \(36,\), got \(108,\)",
    ),
    "heads": ({"num_heads": 5}, ValueError, "num_heads=5"),
    "no heads": ({"num_heads": 0}, ValueError, "num_heads=0"),
    "table": ({"bias_table": torch.ones(169, 2)}, ValueError, r"\(169, 3\), got \(169, 2\)"),
    "table of integers": ({"bias_table": torch.ones(169, 3).int()}, TypeError, "bias_table"),
    "qkv_bias": ({"qkv_bias": torch.ones(12)}, ValueError, r"qkv_bias .* \(36,\), got \(12,\)"),
    "another device": (
        {"bias_table": torch.ones(169, 3, device="meta")},
        ValueError,
        "bias_table is on meta but the map is on cpu",
    ),
    "patch size 0": ({"patch_size": 0}, ValueError, "patch_size .* got 0"),
    "oblong patch": ({"patch_size": (7, 8)}, ValueError, r"patch_size .* got \(7, 8\)"),
    "fractional patch": ({"patch_size": 3.5}, ValueError, "patch_size .* got 3.5"),
    "heads as text": ({"num_heads": "3"}, TypeError, "num_heads must be int, got str"),
    "no channels": ({"qkv": torch.ones(1, 7, 7, 0)}, ValueError, "0 channels"),
    "scale as text": ({"scale": "x"}, TypeError, "scale must be float, got str"),
    "no dropout": ({"dropout_p": None}, TypeError, "dropout_p must be float, got NoneType"),
    "dropout 1": ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    "dropout below 0": ({"dropout_p": -0.1}, ValueError, "got -0.1"),
    "backend": ({"backend": "cuda"}, ValueError, "auto, triton, reference, got 'cuda'"),
}


@pytest.mark.parametrize("case", IPSA_ERRORS)
def test_ipsa_errors_name_the_argument(case):
    change, kind, message = IPSA_ERRORS[case]
    arguments = {**make_ipsa_inputs(SHAPE), "num_heads": 3, "patch_size": 7} | change
    with pytest.raises(kind, match=message):
        catkernels.ipsa_attention(**arguments)
    with pytest.raises(kind, match=message):
        catkernels.unsupported_reasons(catkernels.ipsa_attention, **arguments)


CPSA_ERRORS = {
    "x of integers": ({"x": torch.ones(1, 7, 7, 3).long()}, TypeError, "x must be a floating"),
    "rank": ({"x": torch.ones(3, 7, 7)}, ValueError, r"x must be \(B, H, W, C\), got \(3, 7, 7\)"),
    "qkv_weight": (
        {"qkv_weight": torch.ones(147, 48)},
        ValueError,
        r"qkv_weight must be .* = \(147, 49\), got \(147, 48\)",
    ),
    "no weight": ({"proj_weight": None}, TypeError, "proj_weight must be a tensor"),
    "proj_bias": ({"proj_bias": torch.ones(7)}, ValueError, r"\(49,\), got \(7,\)"),
    "dtypes": (
        {"proj_weight": torch.ones(49, 49, dtype=torch.float64)},
        TypeError,
        "proj_weight is torch.float64 but x is torch.float32",
    ),
    "another device": (
        {"qkv_bias": torch.ones(147, device="meta")},
        ValueError,
        "qkv_bias is on meta",
    ),
    "dropout": ({"dropout_p": 2}, ValueError, "dropout_p"),
    "patch size": ({"patch_size": -1}, ValueError, "patch_size"),
    "backend": ({"backend": "fast"}, ValueError, "backend"),
}


@pytest.mark.parametrize("case", CPSA_ERRORS)
def test_cpsa_errors_name_the_argument(case):
    change, kind, message = CPSA_ERRORS[case]
    arguments = {**make_cpsa_inputs(SHAPE), "patch_size": 7} | change
    with pytest.raises(kind, match=message):
        catkernels.cpsa_attention(**arguments)
    with pytest.raises(kind, match=message):
        catkernels.unsupported_reasons(catkernels.cpsa_attention, **arguments)


def test_that_there_is_no_bias_table_must_be_said():
    """A forgotten one would be the attention of another layer, without a word."""
    inputs = make_ipsa_inputs(SHAPE)
    del inputs["bias_table"]
    for function in (catkernels.ipsa_attention, reference.ipsa_attention):
        with pytest.raises(TypeError, match="'bias_table'"):
            ipsa(inputs, function=function)
        assert ipsa({**inputs, "bias_table": None}, function=function).shape == (2, 9, 16, 12)
    explain = partial(catkernels.unsupported_reasons, catkernels.ipsa_attention)
    with pytest.raises(TypeError, match="'bias_table'"):
        ipsa(inputs, function=explain)


def test_unsupported_reasons_of_a_call_that_lacks_an_argument():
    arguments = list(make_cpsa_inputs(SHAPE).values())[:3]
    with pytest.raises(TypeError, match="missing a required argument: 'proj_weight'"):
        catkernels.unsupported_reasons(catkernels.cpsa_attention, *arguments, patch_size=7)


def test_patch_size_as_a_pair():
    inputs = make_ipsa_inputs(SHAPE)
    pair = catkernels.ipsa_attention(**inputs, num_heads=3, patch_size=(7, 7))
    assert torch.equal(pair, ipsa(inputs))
    assert check_patch_size([5, 5]) == 5
