"""The specification against a restatement, numerical derivatives and its own identities."""

from __future__ import annotations

import pytest
import restatement
import torch
from hypothesis import given
from hypothesis import strategies as st

from catkernels import reference
from catkernels.cases import Shape, make_cpsa_inputs, make_ipsa_inputs

DOUBLE = torch.float64


@st.composite
def shapes(draw) -> Shape:
    return Shape(
        "drawn",
        batch=draw(st.integers(0, 3)),
        height=draw(st.integers(1, 12)),
        width=draw(st.integers(1, 12)),
        channels=draw(st.integers(1, 4)) * (heads := draw(st.integers(1, 3))),
        num_heads=heads,
        patch_size=draw(st.integers(1, 8)),
    )


@given(shapes(), st.booleans(), st.booleans(), st.sampled_from([None, 0.3]))
def test_ipsa_is_what_its_restatement_says(shape, biased, padded_bias, scale):
    inputs = make_ipsa_inputs(shape, DOUBLE)
    if not biased:
        inputs["bias_table"] = None
    if not padded_bias:
        inputs["qkv_bias"] = None
    options = {"num_heads": shape.num_heads, "patch_size": shape.patch_size, "scale": scale}
    torch.testing.assert_close(
        reference.ipsa_attention(**inputs, **options), restatement.ipsa(**inputs, **options)
    )


@given(shapes(), st.booleans(), st.sampled_from([None, 0.3]))
def test_cpsa_is_what_its_restatement_says(shape, biased, scale):
    inputs = make_cpsa_inputs(shape, DOUBLE)
    if not biased:
        inputs["qkv_bias"] = inputs["proj_bias"] = None
    options = {"patch_size": shape.patch_size, "scale": scale}
    torch.testing.assert_close(
        reference.cpsa_attention(**inputs, **options), restatement.cpsa(**inputs, **options)
    )


SMALL = Shape("padded", batch=1, height=3, width=5, channels=4, num_heads=2, patch_size=2)


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_ipsa_derivatives(check):
    inputs = make_ipsa_inputs(SMALL, DOUBLE)
    for tensor in inputs.values():
        tensor.requires_grad_()

    def attend(qkv, bias_table, qkv_bias):
        return reference.ipsa_attention(
            qkv, bias_table, num_heads=2, patch_size=2, qkv_bias=qkv_bias
        )

    assert check(attend, tuple(inputs.values()))


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_cpsa_derivatives(check):
    inputs = make_cpsa_inputs(SMALL, DOUBLE)
    for tensor in inputs.values():
        tensor.requires_grad_()
    assert check(
        lambda *tensors: reference.cpsa_attention(*tensors, patch_size=2), tuple(inputs.values())
    )


def test_attention_maps_are_distributions_of_the_documented_shape():
    shape = Shape("padded", batch=2, height=6, width=9, channels=6, num_heads=3, patch_size=4)
    _, weights = reference.ipsa_attention(
        **make_ipsa_inputs(shape, DOUBLE), num_heads=3, patch_size=4, return_attention=True
    )
    assert weights.shape == (2, 2 * 3, 3, 16, 16)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 6, 3, 16, dtype=DOUBLE))
    _, weights = reference.cpsa_attention(
        **make_cpsa_inputs(shape, DOUBLE), patch_size=4, return_attention=True
    )
    assert weights.shape == (2, 6, 6, 6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 6, 6, dtype=DOUBLE))


def test_dropout_keeps_the_expectation():
    shape = Shape("one window", batch=1, height=4, width=4, channels=2, num_heads=1, patch_size=4)
    inputs = make_ipsa_inputs(shape, DOUBLE)
    options = {"num_heads": 1, "patch_size": 4}
    whole = reference.ipsa_attention(**inputs, **options)
    dropped = [reference.ipsa_attention(**inputs, **options, dropout_p=0.4) for _ in range(3000)]
    assert not torch.equal(dropped[0], dropped[1])
    spread = torch.stack(dropped).std(0) / len(dropped) ** 0.5
    assert ((torch.stack(dropped).mean(0) - whole).abs() < 5 * spread).all()


def test_bias_table_rows_are_ordered_by_dy_then_dx():
    index = reference.relative_position_index(3)
    assert index.dtype == torch.int64
    # pixel 5 is (1, 2), pixel 6 is (2, 0): dy = -1, dx = 2
    assert index[5, 6] == (-1 + 2) * 5 + (2 + 2)
    assert index.diagonal().eq(12).all()


@pytest.mark.parametrize("split", ["windows", "patches"])
def test_splitting_is_undone(split):
    x = torch.randn(2, 6, 9, 5)
    to, back = (getattr(reference, f"{way}_{split}") for way in ("to", "from"))
    assert torch.equal(back(to(x, 3), 3, 6, 9), x)
