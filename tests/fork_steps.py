"""The official block and attention in steps, which forks of them change one by one."""

from __future__ import annotations

import torch.nn.functional as F

from catkernels import official


class Block(official.CATBlock):
    """The official forward pass."""

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
    """The official attention."""

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
