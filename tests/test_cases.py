"""The shapes that tests, benchmarks and `check` share are those of the models."""

from __future__ import annotations

import pytest
import torch

from catkernels import cases
from catkernels.cat import CAT, VARIANTS


@pytest.mark.parametrize("image", [224, (250, 333)], ids=str)
@pytest.mark.parametrize("model", ["tiny", "small"])
def test_stages_are_the_backbones(model, image):
    sizes = VARIANTS[f"cat_{model}"] | {"depths": (1, 1, 1, 1), "out_indices": (0, 1, 2, 3)}
    size = (image, image) if isinstance(image, int) else image
    with torch.device("meta"):
        backbone = CAT(**sizes)
        maps = backbone(torch.empty(2, 3, *size))
    heads = [layer.pre_ipsa_blocks[0].attn.num_heads for layer in backbone.layers]
    stages = cases.cat_stages(model, image, batch=2)
    assert [shape.num_heads for shape in stages] == heads
    assert [(s.batch, s.channels, s.height, s.width) for s in stages] == [m.shape for m in maps]


def test_patches_reach_beyond_the_map():
    assert cases.Shape("", 1, 14, 7, 8, 1).num_patches == 2
    assert cases.Shape("", 1, 15, 8, 8, 1).num_patches == 6


def test_no_two_cases_share_a_name():
    names = [case.name for case in cases.IPSA_CASES]
    assert len(set(names)) == len(names)


def test_a_gradient_shares_no_numbers_with_the_inputs():
    """Whatever the seeds: a map that is its own gradient hides one in the place of the other."""
    case = cases.cpsa_case(7, 14, 3)
    maps = [case.inputs(torch.float32, torch.device("cpu"), seed)["x"] for seed in range(4)]
    for seed in range(4):
        gradient = cases.random_grad(case.shape, maps[0], seed)
        assert not torch.isin(gradient, torch.stack(maps)).any()
