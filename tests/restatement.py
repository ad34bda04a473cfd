"""Both attentions stated a second time, in other words than `catkernels.reference`.

IPSA is global attention among all pixels of the padded map with every pair outside a common window
masked away; CPSA cuts its patches with `torch.nn.functional.unfold`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def ipsa(qkv, bias_table, *, num_heads, patch_size, scale=None, qkv_bias=None):
    batch, height, width, channels = qkv.shape
    rows, columns = -(-height // patch_size), -(-width // patch_size)
    fill = torch.zeros(channels, dtype=qkv.dtype) if qkv_bias is None else qkv_bias
    padded = fill.expand(batch, rows * patch_size, columns * patch_size, channels).clone()
    padded[:, :height, :width] = qkv

    y, x = torch.meshgrid(*map(torch.arange, padded.shape[1:3]), indexing="ij")
    y, x = y.flatten(), x.flatten()
    window = (y // patch_size) * columns + x // patch_size
    together = window[:, None] == window[None, :]
    q, k, v = torch.einsum(
        "bpthd->tbhpd", padded.reshape(batch, len(y), 3, num_heads, channels // 3 // num_heads)
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    if bias_table is not None:
        side = 2 * patch_size - 1
        table = bias_table.reshape(side, side, num_heads)
        dy = ((y[:, None] - y[None, :]) * together) + patch_size - 1
        dx = ((x[:, None] - x[None, :]) * together) + patch_size - 1
        scores = scores + table[dy, dx].permute(2, 0, 1)
    scores = scores.masked_fill(~together, float("-inf"))
    output = torch.einsum("bhij,bhjd->bihd", scores.softmax(-1), v)
    return output.reshape(*padded.shape[:3], channels // 3)[:, :height, :width]


def cpsa(x, qkv_weight, qkv_bias, proj_weight, proj_bias, *, patch_size, scale=None):
    batch, height, width, channels = x.shape
    bottom, right = -height % patch_size, -width % patch_size
    maps = F.pad(x.permute(0, 3, 1, 2), (0, right, 0, bottom)).reshape(
        batch * channels, 1, height + bottom, width + right
    )
    patches = F.unfold(maps, patch_size, stride=patch_size)  # (B*C, N*N, P)
    qkv = torch.einsum("oi,bip->bop", qkv_weight, patches)
    if qkv_bias is not None:
        qkv = qkv + qkv_bias[:, None]
    q, k, v = qkv.chunk(3, 1)
    scores = torch.einsum("bdi,bdj->bij", q, k) * (1 / patch_size if scale is None else scale)
    attended = torch.einsum("bij,bdj->bdi", scores.softmax(-1), v)
    output = torch.einsum("oi,bip->bop", proj_weight, attended)
    if proj_bias is not None:
        output = output + proj_bias[:, None]
    output = F.fold(output, maps.shape[2:], patch_size, stride=patch_size)
    output = output.reshape(batch, channels, *maps.shape[2:]).permute(0, 2, 3, 1)
    return output[:, :height, :width]
