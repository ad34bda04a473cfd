"""MACs by the paper's formulas, and as PyTorch counts them."""

from __future__ import annotations

import pytest
import torch

import catkernels
from catkernels import complexity, official
from catkernels.cat import VARIANTS


@pytest.mark.parametrize(
    ("name", "gmacs"), [("cat_tiny", 2.770), ("cat_small", 6.063), ("cat_base", 8.928)]
)
def test_macs_of_the_paper(name, gmacs):
    with torch.device("meta"):
        model = official.CAT(**VARIANTS[name])
    macs = complexity.count_macs(model, torch.empty(1, 3, 224, 224, device="meta"))
    assert round(macs / 1e9, 3) == gmacs


def test_formulas_equal_the_counts():
    with torch.device("meta"):
        model = catkernels.cat_small()
    stages = complexity.stage_macs(model)
    assert [stage.height for stage in stages] == [56, 28, 14, 7]
    for stage in stages:
        assert stage.ipsa == stage.ipsa_counted
        assert stage.cpsa == stage.cpsa_counted
        assert stage.cpsa < stage.ipsa <= stage.msa
    # by hand: 4 * 49 * 768**2 + 2 * 49 * 49 * 768, and 4 * 49 * 49 * 768 + 2 * 7 * 7 * 768
    assert stages[3].ipsa == 119_293_440
    assert stages[3].cpsa == 7_451_136
    padded = complexity.stage_macs(model, (500, 333))
    assert [(stage.height, stage.width) for stage in padded] == [
        (126, 84),
        (63, 42),
        (35, 21),
        (21, 14),
    ]
