"""Forks of the official block and attention that the tests of comparing share.

Each changes one step of the official forward pass. Most compute something else by it.
"""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from catkernels import official


class Block(official.CATBlock):
    """The official forward pass in steps that a fork can change one by one."""

    def forward(self, x):
        x = self.add(x, self.drop_path(self.attended(self.norm1(x))))
        return self.add(x, self.drop_path(self.mlp(self.norm2(x))))

    def add(self, x, branch):
        return x + branch

    def attended(self, x):
        height, width = self.size()
        batch, tokens, channels = x.shape
        bottom, right = -height % self.patch_size, -width % self.patch_size
        x = self.pad(x.view(batch, height, width, channels), bottom, right)
        return self.crop(self.attend(x), height, width).reshape(batch, tokens, channels)

    def attend(self, x):
        attend = official.attend_within if self.attn_type == "ipsa" else official.attend_across
        return attend(self.attn, x, self.patch_size)

    def pad(self, x, bottom, right):
        return F.pad(x, (0, 0, 0, right, 0, bottom))

    def crop(self, x, height, width):
        return x[:, :height, :width]

    def size(self):
        return (self.H, self.W) if hasattr(self, "H") else self.input_resolution


class Attention(official.Attention):
    """The official attention in steps that a fork can change one by one."""

    def attend(self, qkv):
        q, k, v = self.heads(qkv)
        scores = self.scores(q, k)
        if self.rpe:
            scores = scores + self.bias(scores.shape[-1])
        return self.output(self.attn_drop(self.weights(scores)), v)

    def heads(self, qkv):
        return qkv.view(*qkv.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)

    def scores(self, q, k):
        return (q * self.scale) @ k.mT

    def bias(self, tokens):
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        return bias.view(tokens, tokens, -1).permute(2, 0, 1)

    def weights(self, scores):
        return self.softmax(scores)

    def output(self, attention, v):
        x = (attention @ v).transpose(1, 2)
        return x.reshape(*x.shape[:2], -1)


# Forks of the block, each of which computes something else.


class HalfBranches(official.CATBlock):
    def forward(self, x):
        return x + 0.5 * (super().forward(x) - x)


class SmallResidual(Block):
    def add(self, x, branch):
        return x + 0.1 * branch


class PostNorm(Block):
    def forward(self, x):
        x = self.norm1(x + self.drop_path(self.attended(x)))
        return self.norm2(x + self.drop_path(self.mlp(x)))


class ExtraActivation(Block):
    def attended(self, x):
        return F.gelu(super().attended(x))


class NormsSwapped(Block):
    def forward(self, x):
        x = x + self.drop_path(self.attended(self.norm2(x)))
        return x + self.drop_path(self.mlp(self.norm1(x)))


class NoSecondResidual(Block):
    def forward(self, x):
        x = x + self.drop_path(self.attended(self.norm1(x)))
        return self.drop_path(self.mlp(self.norm2(x)))


class Parallel(Block):
    def forward(self, x):
        return x + self.attended(self.norm1(x)) + self.mlp(self.norm2(x))


class MlpFirst(Block):
    def forward(self, x):
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x + self.drop_path(self.attended(self.norm1(x)))


class OneDropPath(Block):
    def forward(self, x):
        x = x + self.drop_path(self.attended(self.norm1(x)))
        return x + self.mlp(self.norm2(x))


class Rolled(Block):
    def attended(self, x):
        height, width = self.size()
        x = x.unflatten(1, (height, width)).roll((-1, -1), (1, 2)).flatten(1, 2)
        return super().attended(x).unflatten(1, (height, width)).roll((1, 1), (1, 2)).flatten(1, 2)


class PaddedAtTheTop(Block):
    def pad(self, x, bottom, right):
        self.padding = bottom, right
        return F.pad(x, (0, 0, right, 0, bottom, 0))

    def crop(self, x, height, width):
        return x[:, self.padding[0] :, self.padding[1] :]


class PaddedBeforeTheNorm(Block):
    def forward(self, x):
        x = x + self.drop_path(self.attended(x))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def pad(self, x, bottom, right):
        return self.norm1(super().pad(x, bottom, right))


class Transposed(Block):
    def attend(self, x):
        return super().attend(x.transpose(1, 2)).transpose(1, 2)


class InTraining(Block):
    def add(self, x, branch):
        return x + (1.5 if self.training else 1) * branch


class InEvaluation(Block):
    def add(self, x, branch):
        return x + (1 if self.training else 0.9) * branch


class WhereItsMlpTrains(Block):
    def add(self, x, branch):
        return x + (1.5 if self.mlp.training else 1) * branch


class WhereItsDropPathTrains(Block):
    def add(self, x, branch):
        return x + (1.5 if self.drop_path.training else 1) * branch


class NoiseInTraining(Block):
    def attended(self, x):
        return F.dropout(super().attended(x), 0.1, self.training)


class OnAnAttribute(Block):
    gain = 1.0

    def add(self, x, branch):
        return x + self.gain * branch


class OnANestedAttribute(Block):
    def add(self, x, branch):
        return x + self.config["gain"] * branch


class StopsTheGradient(Block):
    def attended(self, x):
        return super().attended(x.detach())


class StopsTheResidualsGradient(Block):
    def add(self, x, branch):
        return x.detach() + branch


class StopsAllGradients(Block):
    def forward(self, x):
        return super().forward(x).detach()


class MixesImages(Block):
    def attended(self, x):
        return super().attended(x - x.mean(0))


class Clamps(Block):
    def forward(self, x):
        return super().forward(x.clamp(-10, 10))


class ByMagnitude(Block):
    def forward(self, x):
        return super().forward(x) if x.abs().max() < 5 else x


class Pair(Block):
    def forward(self, x):
        return super().forward(x), x


class OnlyOnSomeMaps(Block):
    """One that may be right with padding, and is not without."""

    def attended(self, x):
        height, width = self.size()
        whole = not (height % self.patch_size or width % self.patch_size)
        return super().attended(x) * (2 if whole else 1)


# Forks of the attention.


class Cosine(Attention):
    def scores(self, q, k):
        return 10 * F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT


class ScaledTwice(Attention):
    def scores(self, q, k):
        return super().scores(q * self.scale, k)


class Temperature(Attention):
    temperature = 2.0

    def weights(self, scores):
        return self.softmax(scores / self.temperature)


class Unscaled(Attention):
    def scores(self, q, k):
        return q @ k.mT


class Causal(Attention):
    def weights(self, scores):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return self.softmax(scores.masked_fill(mask, float("-inf")))


class Sigmoid(Attention):
    def weights(self, scores):
        return scores.sigmoid()


class SquaredRelu(Attention):
    def weights(self, scores):
        return scores.relu().square()


class SwappedKeys(Attention):
    def heads(self, qkv):
        q, k, v = super().heads(qkv)
        return k, q, v


class InterleavedHeads(Attention):
    def heads(self, qkv):
        return qkv.unflatten(2, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)


class TransposedBias(Attention):
    def bias(self, tokens):
        return super().bias(tokens).mT


class ResidualValues(Attention):
    def output(self, attention, v):
        return super().output(attention, v) + super().output(torch.eye(v.shape[-2]).to(v), v)


class StopsTheBiasGradient(Attention):
    def bias(self, tokens):
        return super().bias(tokens).detach()


class DropsLogits(Attention):
    def attend(self, qkv):
        q, k, v = self.heads(qkv)
        scores = self.attn_drop(self.scores(q, k))
        if self.rpe:
            scores = scores + self.bias(scores.shape[-1])
        return self.output(self.weights(scores), v)


class NeverDropsWeights(Attention):
    def attend(self, qkv):
        q, k, v = self.heads(qkv)
        scores = self.scores(q, k) + (self.bias(q.shape[-2]) if self.rpe else 0)
        return self.output(self.weights(scores), v)


class WhereItsDropoutTrains(Attention):
    def output(self, attention, v):
        return super().output(attention, v) * (0.5 if self.proj_drop.training else 1)


class WhereItsQkvTrains(Attention):
    def scores(self, q, k):
        return super().scores(q, k) * (0.5 if self.qkv.training else 1)


class WhereItsSoftmaxTrains(Attention):
    def weights(self, scores):
        return super().weights(scores * (0.5 if self.softmax.training else 1))


class WhereAnMlpsLayerTrains(Block):
    def attended(self, x):
        return super().attended(x) * (0.5 if self.mlp.fc1.training else 1)


class DropsBeforeTheProjection(Attention):
    def forward(self, x):
        return self.proj(self.proj_drop(self.attend(self.qkv(x))))


# Forks that compute what the official ones do, each in its own way.


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
# What shows in IPSA only: a CPSA block has one head and no bias.
ONLY_IPSA = {InterleavedHeads, TransposedBias, StopsTheBiasGradient}
DROPS = {
    DropsLogits: "its attn_drop is not given the attention weights",
    NeverDropsWeights: "its attn_drop is not given the attention weights",
    DropsBeforeTheProjection: "its proj_drop is not given what proj makes",
    InlineMlp: "it does not compute what CAT's block does",
}
WRONG = [
    fork
    for base in (official.CATBlock, Block, official.Attention, Attention)
    for fork in base.__subclasses__()
    if fork.__module__ == __name__
    and fork not in (Block, Attention, OnAnAttribute, OnANestedAttribute, Remembers, *RIGHT, *DROPS)
]
