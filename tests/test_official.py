"""The baseline itself: both variants of its blocks, and its order of operations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import catkernels
from catkernels import official, reference

TINY = {"embed_dim": 12, "depths": (1,), "num_heads": (3,), "num_classes": 5, "img_size": 56}
both = pytest.mark.parametrize("attention", ["ipsa", "cpsa"])


def make_block(attention: str, size: tuple[int, int] | None) -> official.CATBlock:
    return official.CATBlock(
        12, size, 3, 7, 4.0, True, None, 0.0, 0.0, 0.0, nn.LayerNorm, attention
    )


def test_attention_among_pixels_is_the_references():
    attn = official.Attention(12, (7, 7), 3).double()
    x = torch.randn(2, 14, 21, 12, dtype=torch.float64)
    expected = reference.ipsa_attention(
        attn.qkv(x), attn.relative_position_bias_table, num_heads=3, patch_size=7
    )
    torch.testing.assert_close(official.attend_within(attn, x, 7), attn.proj(expected))


def test_attention_among_patches_is_the_references():
    attn = official.Attention(49, (7, 7), 1, rpe=False).double()
    x = torch.randn(2, 14, 21, 12, dtype=torch.float64)
    weights = (attn.qkv.weight, attn.qkv.bias, attn.proj.weight, attn.proj.bias)
    expected = reference.cpsa_attention(x, *weights, patch_size=7)
    torch.testing.assert_close(official.attend_across(attn, x, 7), expected)


@both
def test_a_block_of_fixed_size_takes_no_other(attention):
    block = make_block(attention, (14, 14))
    assert block(torch.randn(2, 196, 12)).shape == (2, 196, 12)
    with pytest.raises(ValueError, match="needs 14 x 14 tokens, got 195"):
        block(torch.randn(2, 195, 12))
    with pytest.raises(ValueError, match="N=7 does not divide the 9 x 16 map"):
        make_block(attention, (9, 16))(torch.randn(2, 144, 12))


@both
def test_a_block_of_any_size_is_told_which(attention):
    block = make_block(attention, None)
    with pytest.raises(ValueError, match="set H and W"):
        block(torch.randn(2, 144, 12))
    block.H, block.W = 9, 16
    assert block(torch.randn(2, 144, 12)).shape == (2, 144, 12)


def test_a_classifier_that_pads_takes_any_size():
    fixed, padding = official.CAT(**TINY).eval(), official.CAT(**TINY, pads=True).eval()
    padding.load_state_dict(fixed.state_dict())
    ours = catkernels.CAT(**TINY).eval()
    ours.load_state_dict(fixed.state_dict())
    images = torch.randn(2, 3, 50, 61)
    torch.testing.assert_close(padding(images), ours(images))
    with pytest.raises(ValueError, match="tokens"):
        fixed(images)
    images = torch.randn(2, 3, 56, 56)
    assert torch.equal(padding(images), fixed(images))


@pytest.mark.parametrize("option", ["use_checkpoint", "checkpoint_always"])
def test_checkpointing_runs_every_block_twice(option):
    calls = []
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = official.CAT(**TINY, drop_path_rate=0.0, **{option: checkpointed})
        for module in model.modules():
            if isinstance(module, official.Attention):
                module.register_forward_hook(lambda *arguments: calls.append(1))
        model(torch.ones(1, 3, 56, 56)).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert len(calls) == 3 + 2 * 3
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
