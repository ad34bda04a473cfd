"""Forks of the official block and attention that compute something else, by one step each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from fork_steps import Attention, Block
from right_forks import InlineMlp

from catkernels import official

# Of the block.


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


class WhereAnMlpsLayerTrains(Block):
    def attended(self, x):
        return super().attended(x) * (0.5 if self.mlp.fc1.training else 1)


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


# Of the attention.


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


class DropsBeforeTheProjection(Attention):
    def forward(self, x):
        return self.proj(self.proj_drop(self.attend(self.qkv(x))))


# What shows in IPSA only: a CPSA block has one head and no bias.
ONLY_IPSA = {InterleavedHeads, TransposedBias, StopsTheBiasGradient}
# What is wrong only where something is dropped, and by which reason it is then left alone.
DROPS = {
    DropsLogits: "its attn_drop is not given the attention weights",
    NeverDropsWeights: "its attn_drop is not given the attention weights",
    DropsBeforeTheProjection: "its proj_drop is not given what proj makes",
    InlineMlp: "it does not compute what CAT's block does",
}
# What is wrong in every block. The gain of some forks is 1 until a test sets it.
WRONG = [
    fork
    for base in (official.CATBlock, Block, Attention)
    for fork in base.__subclasses__()
    if fork.__module__ == __name__ and fork not in (OnAnAttribute, OnANestedAttribute, *DROPS)
]
