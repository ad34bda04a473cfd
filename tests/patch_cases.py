"""Models in the official structure that the tests of patching share."""

from __future__ import annotations

import torch
from tiny_models import TINY
from torch import nn

from catkernels import official

KINDS = {
    "classifier": {},
    "backbone": {"out_indices": (0, 1)},
    "checkpointed": {"checkpoint_always": True},
    "dropping": {
        "drop_rate": 0.1,
        "ipsa_attn_drop": 0.2,
        "cpsa_attn_drop": 0.2,
        "drop_path_rate": 0.3,
    },
}
SIZES = {"backbone": (50, 61)}


def build(kind: str = "classifier") -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(3)
    return official.CAT(**TINY, **KINDS[kind]), torch.randn(2, 3, *SIZES.get(kind, (56, 56)))


def run(model, images):
    outputs = model(images)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def step(model, images):
    """The weights after one step of training from a fixed state of the random generator."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(7)
    sum(output.square().mean() for output in run(model, images)).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    return gradients, model.state_dict()
