"""What joins pixels and tokens."""

from __future__ import annotations

import torch

from catkernels.layers import PatchProjection


def test_patch_projection_orders_its_neighbours():
    projection = PatchProjection(1, norm_layer=lambda _: torch.nn.Identity())
    with torch.no_grad():
        projection.reduction.weight.copy_(torch.eye(4)[:2])
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 2, 2, 1)
    assert projection(x).flatten().tolist() == [1.0, 3.0]
