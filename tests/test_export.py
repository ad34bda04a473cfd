"""`torch.export` of the classifier and the backbone, with a batch of any size."""

from __future__ import annotations

import io
from itertools import product

import pytest
import torch

import catkernels
from catkernels import official

TINY = {"embed_dim": 12, "depths": (1, 1), "num_heads": (3, 3), "num_classes": 4, "ape": True}


def build(kind: str) -> tuple[torch.nn.Module, tuple[int, int]]:
    torch.manual_seed(0)
    if kind == "patched":
        model = official.CAT(**TINY, img_size=56)
        catkernels.patch(model)
        return model.eval(), (56, 56)
    options = {"out_indices": (0, 1)} if kind == "backbone" else {}
    return catkernels.CAT(**TINY, img_size=56, **options).eval(), (50, 61)


# in plain runs each value of each parameter at least once
SAMPLE = [("classifier", False, True), ("backbone", False, False), ("patched", True, False)]


@pytest.mark.parametrize(
    ("kind", "strict", "grad"),
    [
        pytest.param(*case, marks=() if case in SAMPLE else pytest.mark.full)
        for case in product(("classifier", "backbone", "patched"), (False, True), (False, True))
    ],
)
def test_round_trip(kind, strict, grad):
    model, size = build(kind)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(
            model, (torch.randn(2, 3, *size),), dynamic_shapes=({0: batch},), strict=strict
        )
        torch.export.save(program, file := io.BytesIO())
        file.seek(0)
        loaded = torch.export.load(file).module()
        for images in (torch.randn(1, 3, *size), torch.randn(5, 3, *size)):
            torch.testing.assert_close(loaded(images), model(images))
