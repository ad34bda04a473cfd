"""A block of ours in the place of another one: what it takes over, and what it gives back."""

from __future__ import annotations

import pytest
import torch
from patch_cases import build
from torch import nn

import catkernels
from catkernels.patching.patch import patch, unpatch


def test_unpatch_keeps_children_that_were_replaced_meanwhile():
    model, _ = build()
    patch(model)
    block = model.layers[0].cpsa_blocks[0]
    block.mlp = mlp = nn.Identity()
    unpatch(model)
    assert model.layers[0].cpsa_blocks[0].mlp is mlp


def test_unpatch_keeps_what_was_added_meanwhile():
    model, _ = build()
    patch(model)
    block = model.layers[0].cpsa_blocks[0]
    block.adapter = nn.Linear(1, 1)
    block.register_parameter("gain", nn.Parameter(torch.ones(1)))
    block.register_buffer("seen", torch.zeros(1))
    block.register_buffer("scratch", torch.zeros(1), persistent=False)
    parts, state = dict(model.named_modules()), model.state_dict()
    unpatch(model)
    assert dict(model.named_modules()).keys() == parts.keys()
    assert model.state_dict().keys() == state.keys()
    assert model.layers[0].cpsa_blocks[0].gain is block.gain
    assert model.layers[0].cpsa_blocks[0].scratch is block.scratch


def test_methods_and_attributes_of_the_original_block_stay_reachable():
    model, _ = build()
    official_block = model.layers[0].cpsa_blocks[0]
    official_block.flops = lambda: 42
    patch(model)
    block = model.layers[0].cpsa_blocks[0]
    assert block.flops() == 42
    assert block.num_heads == official_block.num_heads
    with pytest.raises(AttributeError, match="no_such_thing"):
        block.no_such_thing  # noqa: B018


def test_the_backend_reaches_an_attention_of_ours_in_their_block():
    model, _ = build()
    block = model.layers[0].pre_ipsa_blocks[0]
    block.attn = catkernels.IPSA(12, 7, 3)
    patch(model, backend="reference")
    assert block.attn.backend == "reference"
    model.layers[0].pre_ipsa_blocks[0].backend = "triton"
    assert block.attn.backend == "triton"
    unpatch(model)
    assert block.attn.backend == "auto"
