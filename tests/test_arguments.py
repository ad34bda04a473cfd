"""What both attentions take, and the words in which they refuse the rest."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import catkernels
from catkernels import reference
from catkernels.arguments import check_patch_size
from catkernels.cases import Shape, make_cpsa_inputs, make_ipsa_inputs

SHAPE = Shape("padded", batch=2, height=9, width=16, channels=12, num_heads=3)
OPTIONS = {"num_heads": SHAPE.num_heads, "patch_size": SHAPE.patch_size}


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
    arguments = make_ipsa_inputs(SHAPE) | OPTIONS | change
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
            function(**inputs, **OPTIONS)
        assert function(**inputs, bias_table=None, **OPTIONS).shape == (2, 9, 16, 12)
    explain = partial(catkernels.unsupported_reasons, catkernels.ipsa_attention)
    with pytest.raises(TypeError, match="'bias_table'"):
        explain(**inputs, **OPTIONS)


def test_unsupported_reasons_of_a_call_that_lacks_an_argument():
    arguments = list(make_cpsa_inputs(SHAPE).values())[:3]
    with pytest.raises(TypeError, match="missing a required argument: 'proj_weight'"):
        catkernels.unsupported_reasons(catkernels.cpsa_attention, *arguments, patch_size=7)


def test_patch_size_as_a_pair():
    inputs = make_ipsa_inputs(SHAPE)
    pair = catkernels.ipsa_attention(**inputs, num_heads=3, patch_size=(7, 7))
    assert torch.equal(pair, catkernels.ipsa_attention(**inputs, **OPTIONS))
    assert check_patch_size([5, 5]) == 5
