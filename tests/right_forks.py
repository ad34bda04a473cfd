"""Forks of the official block and attention that compute the same, each in its own way."""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from fork_steps import Attention, Block
from torch.utils.checkpoint import checkpoint


class InPlace(Block):
    def add(self, x, branch):
        x += branch
        return x


class Recomputes(Block):
    def attended(self, x):
        return checkpoint(super().attended, x, use_reentrant=False)


class RecomputesReentrantly(Block):
    def attended(self, x):
        return checkpoint(super().attended, x, use_reentrant=True)


class InlineNorm(Block):
    def forward(self, x):
        norm = self.norm1
        normed = F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        x = x + self.drop_path(self.attended(normed))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class InlineMlp(Block):
    def forward(self, x):
        x = x + self.drop_path(self.attended(self.norm1(x)))
        mlp = self.mlp
        return x + self.drop_path(mlp.fc2(mlp.act(mlp.fc1(self.norm2(x)))))


class FlatMlp(Block):
    def forward(self, x):
        x = x + self.drop_path(self.attended(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x).flatten(0, 1)).view_as(x))


class Remembers(Block):
    """One with state that its results do not show."""

    def attended(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        self.seen.append(x.shape)
        self.last = super().attended(x)
        random.random()
        np.random.random()  # noqa: NPY002 what user code draws from
        torch.rand(1)
        if self.training:
            self.cache["gain"].append(torch.rand(1, generator=self.generator))
        self.ema.mul_(0.5)
        return self.last


class Fused(Attention):
    def attend(self, qkv):
        q, k, v = self.heads(qkv)
        bias = self.bias(q.shape[-2]).unsqueeze(0) if self.rpe else None
        dropout_p = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, bias, dropout_p, scale=self.scale)
        return x.transpose(1, 2).reshape(*qkv.shape[:2], -1)


class SinglePrecisionSoftmax(Attention):
    def weights(self, scores):
        return scores.float().softmax(-1).type_as(scores)


RIGHT = [
    InPlace,
    Recomputes,
    RecomputesReentrantly,
    InlineNorm,
    InlineMlp,
    FlatMlp,
    Fused,
    SinglePrecisionSoftmax,
]
