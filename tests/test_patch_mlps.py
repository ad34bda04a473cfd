"""Which MLPs of somebody's blocks are taken for the parts that they have, once patched."""

from __future__ import annotations

import pytest
from dense_cases import AUTOCAST, assert_near, results, rows, seeded
from torch import nn

import catkernels
from catkernels import official

pytestmark = pytest.mark.usefixtures("round_to_nearest_bf16", "tf32_on_gpus")


class LayerScaled(official.Mlp):
    """With the parts of an official MLP, and more to it."""

    def forward(self, x):
        return super().forward(x) * 2


def test_an_mlp_that_computes_something_else_is_called_itself(device, launches):
    """Its parts do not say so, its numbers do."""
    block = official.CATBlock(
        32, (7, 7), 2, 7, 4.0, True, None, 0.0, 0.0, 0.0, nn.LayerNorm, "ipsa"
    )
    block.mlp = LayerScaled(32, 128)
    model, x = nn.Sequential(block).to(device), rows(2, 49, 32).to(device)
    expected = results(seeded, model, x, AUTOCAST)
    catkernels.patch(model, backend="triton")
    assert model[0].read_mlp() is None
    assert_near(results(seeded, model, x, AUTOCAST), expected)
    assert not launches["mlp_forward_kernel"]


class Gained(official.Mlp):
    """One that is an official MLP by an attribute."""

    def forward(self, x):
        return self.gain * super().forward(x)


class StopsInTraining(official.Mlp):
    """One whose numbers are right, and gradients are not."""

    def forward(self, x):
        return super().forward(x.detach() if self.training else x)


def test_an_mlp_is_known_by_its_attributes_and_gradients_too():
    model = official.CAT(embed_dim=16, depths=(1,), num_heads=(1,), out_indices=(0,))
    blocks = [module for module in model.modules() if hasattr(module, "attn_type")]
    for block, gain in zip(blocks, (1.0, 0.5, 1.0), strict=True):
        block.mlp.__class__, block.mlp.gain = Gained, gain
    catkernels.patch(model)
    ours = [module for module in model.modules() if isinstance(module, catkernels.CATBlock)]
    assert [block.read_mlp() is not None for block in ours] == [True, False, True]
    catkernels.unpatch(model)
    for block in blocks:
        block.mlp.__class__ = StopsInTraining
    catkernels.patch(model)
    ours = [module for module in model.modules() if isinstance(module, catkernels.CATBlock)]
    assert [block.read_mlp() for block in ours] == [None] * 3
