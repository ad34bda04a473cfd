"""What an attention or a block consists of, read by the official names."""

from __future__ import annotations

import pytest
from tiny_models import TINY
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import catkernels
from catkernels import official
from catkernels.parts import AttentionParts, BlockParts, is_plain_linear, map_size, patch_side


@pytest.mark.parametrize("kind", [catkernels.CAT, official.CAT])
def test_ours_and_the_official_are_read_alike(kind):
    model = kind(**TINY, ipsa_attn_drop=0.2).train()
    block = model.layers[1].pre_ipsa_blocks[0]
    parts = AttentionParts.of(block.attn)
    assert (parts.num_heads, parts.head_dim, parts.dropout_p) == (3, 8, 0.2)
    assert parts.scale == 8**-0.5
    assert parts.table is block.attn.relative_position_bias_table
    assert parts.plain_layers == (block.attn.qkv, block.attn.proj)
    assert parts.is_arithmetic
    assert AttentionParts.of(block.attn.eval()).dropout_p == 0

    parts = BlockParts.of(block)
    assert (parts.attn_type, parts.side, parts.channels, parts.num_heads) == ("ipsa", 7, 24, 3)


def test_of_a_map_of_unknown_size_more_than_one_patch_is_expected():
    block = official.CAT(**TINY, out_indices=(0, 1)).layers[0].cpsa_blocks[0]
    assert map_size(block) is None
    assert BlockParts.of(block).num_patches == 2
    block.H, block.W = 15, 8
    assert BlockParts.of(block).num_patches == 6


def test_what_somebody_listens_to_is_not_only_arithmetic():
    attn = official.CAT(**TINY).layers[0].cpsa_blocks[0].attn
    attn.softmax.register_forward_hook(lambda *_: None)
    parts = AttentionParts.of(attn)
    assert not parts.is_arithmetic
    assert parts.plain_layers is not None
    attn.qkv.register_forward_hook(lambda *_: None)
    assert AttentionParts.of(attn).plain_layers is None


class Scaled(nn.Linear):
    """A subclass may compute anything."""


def test_plain_linear_layers():
    assert is_plain_linear(nn.Linear(2, 2))
    assert not is_plain_linear(Scaled(2, 2))
    assert not is_plain_linear(weight_norm(nn.Linear(2, 2)))


def test_oblong_patches_have_no_side():
    assert patch_side((7, 7)) == 7
    assert patch_side((7, 8)) is None
