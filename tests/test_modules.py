"""IPSA and CPSA as drop-ins for the official modules."""

from __future__ import annotations

from copy import deepcopy

import pytest
import restatement
import torch
from torch import nn

import catkernels
from catkernels import official
from catkernels.accuracy import assert_within_error_budget

OPTIONS = [
    {},
    {"qkv_bias": False},
    {"qk_scale": 0.2},
    {"attn_drop": 0.3, "proj_drop": 0.2},
]


def pair(attention: str, **options):
    """Our module and the official one with the same weights."""
    torch.manual_seed(1)
    if attention == "ipsa":
        ours, theirs = (
            catkernels.IPSA(12, 7, 3, **options),
            official.Attention(12, (7, 7), 3, **options),
        )
    else:
        ours = catkernels.CPSA(7, **options)
        theirs = official.Attention(49, (7, 7), 1, rpe=False, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def tokens(attention: str) -> torch.Tensor:
    return torch.randn(8, 49, 12) if attention == "ipsa" else torch.randn(24, 4, 49)


both = pytest.mark.parametrize("attention", ["ipsa", "cpsa"])


@both
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_stands_in_for_the_official_attention(attention, options):
    ours, theirs = pair(attention, **options)
    theirs.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.eval(), theirs.eval()
    x = tokens(attention).requires_grad_()
    cotangent = torch.randn(x.shape)
    gradients = []
    for module in (ours, theirs, deepcopy(theirs).double()):
        dtype = next(module.parameters()).dtype
        y = module(x.to(dtype))
        inputs = (x, *module.parameters())
        gradients.append((y, *torch.autograd.grad(y, inputs, cotangent.to(dtype))))
    for actual, same, double in zip(*gradients, strict=True):
        assert_within_error_budget(actual, same, double.double())


@both
def test_inference_gives_the_same_numbers(attention):
    ours, theirs = pair(attention)
    x = tokens(attention)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x))


@both
def test_a_map_is_its_tokens(attention):
    ours, theirs = pair(attention)
    x = torch.randn(2, 14, 14, 12)
    attend = official.attend_within if attention == "ipsa" else official.attend_across
    torch.testing.assert_close(ours(x), attend(theirs, x, 7))


@both
def test_dropout_is_of_training_only(attention):
    ours, _ = pair(attention, attn_drop=0.5)
    x = tokens(attention)
    assert not torch.equal(ours(x), ours(x))
    ours.eval()
    assert torch.equal(ours(x), ours(x))


@both
def test_attention_maps(attention):
    ours, _ = pair(attention)
    x = tokens(attention)
    y, weights = ours(x, return_attention=True)
    torch.testing.assert_close(y, ours(x))
    assert weights.shape == {"ipsa": (8, 1, 3, 49, 49), "cpsa": (24, 1, 4, 4)}[attention]


def test_rpe_can_be_left_out():
    module = catkernels.IPSA(12, 4, 3, rpe=False)
    assert not any("relative" in name for name in module.state_dict())
    assert module(torch.randn(1, 8, 8, 12)).shape == (1, 8, 8, 12)


@both
@pytest.mark.parametrize("child", ["qkv", "proj"])
def test_hooks_on_children_fire(attention, child):
    ours, _ = pair(attention)
    x = torch.randn(2, 9, 16, 12)
    expected = ours(x)
    calls = []
    handle = getattr(ours, child).register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(ours(x), expected)
    assert calls == [1]
    handle.remove()
    ours(x)
    assert calls == [1]


@both
def test_a_hook_on_the_output_sees_the_whole_batch_once(attention):
    ours, _ = pair(attention)
    shapes = []
    ours.proj_drop.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    x = torch.randn(40, 56, 56, 12)
    with torch.inference_mode():
        ours.eval()(x)
    assert shapes == [x.shape]


@both
@pytest.mark.parametrize("size", [(13, 20), (7, 6), (1, 1)], ids=str)
def test_odd_maps_are_what_the_restatement_says(attention, size):
    ours, _ = pair(attention)
    ours.double()
    x = torch.randn(2, *size, 12, dtype=torch.float64)
    qkv, proj = ours.qkv, ours.proj
    if attention == "ipsa":
        expected = proj(
            restatement.ipsa(
                qkv(x),
                ours.relative_position_bias_table,
                num_heads=3,
                patch_size=7,
                qkv_bias=qkv.bias,
            )
        )
    else:
        weights = (qkv.weight, qkv.bias, proj.weight, proj.bias)
        expected = restatement.cpsa(x, *weights, patch_size=7)
    torch.testing.assert_close(ours(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), expected.detach())


@both
def test_integers_are_refused(attention):
    ours, _ = pair(attention)
    with pytest.raises(TypeError, match=r"x must be a floating-point tensor, got torch\.int64"):
        ours(torch.ones(1, 7, 7, 12, dtype=torch.int64))
    with pytest.raises(TypeError, match="x must be a floating-point tensor, got NoneType"):
        ours(None)


@both
@pytest.mark.parametrize("form", ["map", "tokens"])
def test_another_dtype_or_device_than_the_layers_is_refused_in_our_words(attention, form):
    ours, _ = pair(attention)
    x = torch.randn(1, 7, 14, 12) if form == "map" else tokens(attention)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        with pytest.raises(
            TypeError, match=rf"x is {dtype} but the layer's weights are torch\.float"
        ):
            ours(x.to(dtype))
    with pytest.raises(
        ValueError, match="x is on meta but the layer's weights are on cpu: move both"
    ):
        ours(x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x.bfloat16()).dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"x is torch\.float64 but the layer's weights are"):
            ours(x.double())


@both
def test_no_tokens_at_all(attention):
    ours, _ = pair(attention)
    assert ours(tokens(attention)[:0]).shape == (0, *tokens(attention).shape[1:])


class LowRank(nn.Module):
    """An adapter of the kind that parameter-efficient training puts around a linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, 2, bias=False)
        self.up = nn.Linear(2, linear.out_features)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


@both
@pytest.mark.parametrize("child", ["qkv", "proj"])
@pytest.mark.parametrize("size", [(14, 14), (9, 16)], ids=["whole", "padded"])
def test_adapters_are_honoured(attention, child, size):
    ours, theirs = pair(attention)
    adapter = LowRank(getattr(theirs, child))
    setattr(ours, child, adapter)
    setattr(theirs, child, adapter)
    x = torch.randn(2, *size, 12)
    padded = torch.nn.functional.pad(x, (0, 0, 0, -size[1] % 7, 0, -size[0] % 7))
    attend = official.attend_within if attention == "ipsa" else official.attend_across
    torch.testing.assert_close(ours(x), attend(theirs, padded, 7)[:, : size[0], : size[1]])


@both
def test_a_dropout_of_another_kind_is_refused_and_not_bypassed(attention):
    ours, _ = pair(attention)
    ours.attn_drop = nn.Sequential(nn.Dropout(0.5))
    with pytest.raises(TypeError, match=r"attn_drop must be an nn\.Dropout .* got Sequential"):
        ours(tokens(attention))


def test_weight_normed_cpsa_refuses_triton():
    module = catkernels.CPSA(7, backend="triton")
    torch.nn.utils.parametrizations.weight_norm(module.qkv)
    with pytest.raises(ValueError, match=r"qkv or proj is no plain nn\.Linear"):
        module(torch.randn(1, 14, 14, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: catkernels.IPSA(13, 7, 3), "dim=13 is not divisible by num_heads=3"),
        (lambda: catkernels.IPSA(12, 0, 3), "patch_size"),
        (lambda: catkernels.IPSA(12, 7, 3, backend="cuda"), "backend must be one of"),
        (lambda: catkernels.IPSA(12)(torch.randn(2, 48, 12)), r"got \(2, 48, 12\)"),
        (lambda: catkernels.IPSA(12)(torch.randn(2, 7, 7, 13)), r"\(B, H, W, 12\)"),
        (lambda: catkernels.IPSA(12)(torch.randn(1, 49, 13)), r"got \(1, 49, 13\)"),
        (lambda: catkernels.IPSA(12, attn_drop=1.0), r"attn_drop must be in \[0, 1\)"),
        (lambda: catkernels.CPSA(7, proj_drop=1.5), r"proj_drop must be in \[0, 1\), got 1.5"),
        (lambda: catkernels.CPSA(7)(torch.randn(2, 4, 48)), r"got \(2, 4, 48\)"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("assign", [False, True])
def test_a_table_in_another_order_is_not_loaded_in_silence(assign):
    """The index is not read: it follows from the patch size."""
    module = catkernels.IPSA(32, 7, 2)
    state = module.state_dict()
    module.load_state_dict(state, assign=assign)
    narrow = {name: t if t.is_floating_point() else t.int() for name, t in state.items()}
    module.load_state_dict(narrow, assign=assign)
    turned = {name: t if t.is_floating_point() else t.flip(0) for name, t in state.items()}
    with pytest.raises(RuntimeError, match="relative_position_index orders the rows of the bias"):
        module.load_state_dict(turned, assign=assign, strict=False)
