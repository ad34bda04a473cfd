"""The specification of both attentions in plain PyTorch.

It runs on any device and in any floating dtype and is differentiable to any order. Everything else
in this package is measured against it. Maps are channels-last, (B, H, W, C).

Source: "CAT: Cross Attention in Vision Transformer" (arXiv 2106.05786), sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# The bytes that one slice of the batch may touch on a CPU, per thread. Slices of this size stay in
# the outer cache levels; much smaller ones lose more to call overhead than the cache gives back.
SLICE_BYTES_PER_THREAD = 8 * 2**20


def ipsa_attention(
    qkv: Tensor,
    bias_table: Tensor | None = None,
    *,
    num_heads: int,
    patch_size: int,
    scale: float | None = None,
    qkv_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    return_attention: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Inner-patch self-attention (section 3.1): ``softmax(scale q k^T + bias) v`` in each window.

    Args:
        qkv: queries, keys and values (B, H, W, 3C), the last axis laid out (3, heads, C / heads).
        bias_table: learned relative position bias ((2N - 1)**2, heads), or None for no bias.
        num_heads: number of heads; divides C.
        patch_size: N, the side of the square, non-overlapping windows.
        scale: factor on ``q k^T``; None is ``(C / heads)**-0.5``.
        qkv_bias: q, k, v (3C,) of the pixels that pad H and W to multiples of N; None is zeros.
            Padded pixels are ordinary tokens: they are not masked.
        dropout_p: probability of dropping an attention weight.
        return_attention: also return the attention weights, before dropout.

    Returns:
        The map (B, H, W, C); with ``return_attention`` also (B, windows, heads, N*N, N*N).
    """

    def attend(qkv: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        batch, height, width, _ = qkv.shape
        tokens = patch_size * patch_size
        padded = pad_to_patches(qkv, patch_size, qkv_bias)
        windows = to_windows(padded, patch_size)  # (B, windows, N*N, 3C)
        heads = windows.reshape(*windows.shape[:2], tokens, 3, num_heads, channels // num_heads)
        query, key, value = heads.permute(3, 0, 1, 4, 2, 5)  # each (B, windows, heads, N*N, D)

        scores = (query * scale) @ key.transpose(-2, -1)
        if bias_table is not None:
            scores = scores + relative_position_bias(bias_table, patch_size)
        attention = scores.softmax(-1).to(value.dtype)
        output = F.dropout(attention, dropout_p) @ value  # (B, windows, heads, N*N, D)

        output = output.transpose(2, 3).reshape(batch, -1, tokens, channels)
        output = from_windows(output, patch_size, *padded.shape[1:3])[:, :height, :width]
        return (output, attention) if return_attention else output

    channels = qkv.shape[-1] // 3
    scale = (channels // num_heads) ** -0.5 if scale is None else scale
    if return_attention or dropout_p or _must_run_whole(qkv, bias_table, qkv_bias):
        return attend(qkv)
    # qkv, its partitioned copy, scores, weights and output of one image
    pixels = qkv.shape[1] * qkv.shape[2]
    values = pixels * (7 * channels + 3 * num_heads * patch_size**2)
    return _in_slices(attend, qkv, values * qkv.element_size())


def cpsa_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    patch_size: int,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_attention: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-patch self-attention (section 3.2) among the P patches of each single-channel map.

    A patch is one token of dimension N*N (its pixels, row-major); one head; the weights are shared
    by all channels: ``proj(softmax(scale q k^T) v)`` with ``q, k, v = split(qkv(patches))``.

    Args:
        x: map (B, H, W, C).
        qkv_weight: (3 N*N, N*N).
        qkv_bias: (3 N*N,) or None.
        proj_weight: (N*N, N*N).
        proj_bias: (N*N,) or None.
        patch_size: N. Where N does not divide H or W the map is padded with zeros, without a mask.
        scale: factor on ``q k^T``; None is ``(N*N)**-0.5``.
        dropout_p: probability of dropping an attention weight.
        return_attention: also return the attention weights, before dropout.

    Returns:
        The map (B, H, W, C); with ``return_attention`` also (B, C, P, P).
    """

    def attend(x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        height, width = x.shape[1:3]
        padded = pad_to_patches(x, patch_size)
        patches = to_patches(padded, patch_size)  # (B, C, P, N*N)
        if one_patch and not dropout_p and not return_attention:
            # the softmax over a single patch is 1, whatever its query and key
            output = F.linear(patches, value_weight, value_bias)
            attention = None
        else:
            query, key, value = F.linear(patches, qkv_weight, qkv_bias).chunk(3, -1)
            attention = ((query * scale) @ key.transpose(-2, -1)).softmax(-1).to(value.dtype)
            output = F.dropout(attention, dropout_p) @ value
        output = F.linear(output, proj_weight, proj_bias)
        output = from_patches(output, patch_size, *padded.shape[1:3])[:, :height, :width]
        return (output, attention) if return_attention else output

    tokens = patch_size * patch_size
    scale = tokens**-0.5 if scale is None else scale
    one_patch = max(x.shape[1], x.shape[2]) <= patch_size
    value_weight = qkv_weight[2 * tokens :]
    value_bias = None if qkv_bias is None else qkv_bias[2 * tokens :]
    weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)
    if return_attention or dropout_p or _must_run_whole(x, *weights):
        return attend(x)
    # x, its patches, q, k, v, the outputs of both products and the scores of one image
    pixels = x.shape[1] * x.shape[2]
    values = pixels * x.shape[3] * (8 + 2 * pixels // tokens**2)
    return _in_slices(attend, x, values * x.element_size())


def relative_position_index(patch_size: int, device: torch.device | None = None) -> Tensor:
    """Row of the bias table for each pair of pixels (i, j) of a window: (N*N, N*N), int64.

    With (dy, dx) the position of i minus that of j, the row is (dy + N-1) (2N-1) + (dx + N-1).
    """
    pixel = torch.arange(patch_size * patch_size, device=device)
    y, x = pixel // patch_size, pixel % patch_size
    dy = y[:, None] - y[None, :] + patch_size - 1
    dx = x[:, None] - x[None, :] + patch_size - 1
    return dy * (2 * patch_size - 1) + dx


def relative_position_bias(bias_table: Tensor, patch_size: int) -> Tensor:
    """A bias table ((2N-1)**2, heads) spread over the pairs of pixels: (heads, N*N, N*N)."""
    return bias_table[relative_position_index(patch_size, bias_table.device)].permute(2, 0, 1)


def pad_to_patches(x: Tensor, patch_size: int, fill: Tensor | None = None) -> Tensor:
    """Pad (B, H, W, C) at the bottom and right to multiples of N with ``fill`` (C,) or zeros."""
    height, width = x.shape[1:3]
    bottom, right = -height % patch_size, -width % patch_size
    if not bottom and not right:
        return x
    padded = F.pad(x, (0, 0, 0, right, 0, bottom))
    if fill is None:
        return padded
    inside_y = torch.arange(height + bottom, device=x.device) < height
    inside_x = torch.arange(width + right, device=x.device) < width
    return torch.where((inside_y[:, None] & inside_x)[..., None], padded, fill.to(x.dtype))


def to_windows(x: Tensor, patch_size: int) -> Tensor:
    """(B, H, W, C) -> (B, windows, N*N, C): the pixels of each window, row-major."""
    batch, height, width, channels = x.shape
    rows, columns = height // patch_size, width // patch_size
    x = x.reshape(batch, rows, patch_size, columns, patch_size, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, patch_size**2, channels)


def from_windows(windows: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """The inverse of `to_windows`: (B, windows, N*N, C) -> (B, H, W, C)."""
    batch, channels = windows.shape[0], windows.shape[-1]
    rows, columns = height // patch_size, width // patch_size
    x = windows.reshape(batch, rows, columns, patch_size, patch_size, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels)


def to_patches(x: Tensor, patch_size: int) -> Tensor:
    """(B, H, W, C) -> (B, C, P, N*N): each channel's patches, their pixels row-major."""
    batch, height, width, channels = x.shape
    rows, columns = height // patch_size, width // patch_size
    x = x.reshape(batch, rows, patch_size, columns, patch_size, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, rows * columns, patch_size**2)


def from_patches(patches: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """The inverse of `to_patches`: (B, C, P, N*N) -> (B, H, W, C)."""
    batch, channels = patches.shape[:2]
    rows, columns = height // patch_size, width // patch_size
    x = patches.reshape(batch, channels, rows, columns, patch_size, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, height, width, channels)


def _must_run_whole(x: Tensor, *others: Tensor | None) -> bool:
    """Whether slicing the batch would be wrong (gradients, tracing) or useless (not a CPU)."""
    wants_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, *others)
    )
    return wants_grad or x.device.type != "cpu" or torch.compiler.is_compiling()


def _in_slices(attend: Callable[[Tensor], Tensor], x: Tensor, bytes_per_image: int) -> Tensor:
    """``attend(x)`` in slices of the batch that stay in cache."""
    budget = SLICE_BYTES_PER_THREAD * torch.get_num_threads()
    images = max(1, budget // max(1, bytes_per_image))
    if images >= x.shape[0]:
        return attend(x)
    return torch.cat([attend(part) for part in x.split(images)])
