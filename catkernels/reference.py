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


def ipsa_attention(
    qkv: Tensor,
    bias_table: Tensor | None,
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
        bias_table: learned relative position bias ((2N - 1)**2, heads). None: no bias.
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
    height, width = qkv.shape[1:3]
    tokens = patch_size * patch_size
    channels = qkv.shape[-1] // 3
    scale = (channels // num_heads) ** -0.5 if scale is None else scale
    padded = pad_to_patches(qkv, patch_size, qkv_bias)
    windows = to_windows(padded, patch_size)  # (B, windows, N*N, 3C)
    heads = windows.reshape(*windows.shape[:2], tokens, 3, num_heads, channels // num_heads)
    query, key, value = heads.permute(3, 0, 1, 4, 2, 5)  # each (B, windows, heads, N*N, D)

    scores = (query * scale) @ key.transpose(-2, -1)
    if bias_table is not None:
        scores = scores + relative_position_bias(bias_table, patch_size)
    attention = scores.softmax(-1).to(value.dtype)
    output = _drop(attention, dropout_p) @ value  # (B, windows, heads, N*N, D)

    output = output.transpose(2, 3).reshape(*windows.shape[:2], tokens, channels)
    output = from_windows(output, patch_size, *padded.shape[1:3])[:, :height, :width]
    return (output, attention) if return_attention else output


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

    return cpsa_with_layers(
        x,
        lambda patches: F.linear(patches, qkv_weight, qkv_bias),
        lambda patches: F.linear(patches, proj_weight, proj_bias),
        patch_size=patch_size,
        scale=scale,
        dropout_p=dropout_p,
        return_attention=return_attention,
    )


def cpsa_with_layers(
    x: Tensor,
    qkv: Callable[[Tensor], Tensor],
    proj: Callable[[Tensor], Tensor],
    *,
    patch_size: int,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_attention: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`cpsa_attention` with any two layers: (B, C, P, N*N) -> (B, C, P, 3 N*N), and -> the same."""
    height, width = x.shape[1:3]
    scale = 1 / patch_size if scale is None else scale
    padded = pad_to_patches(x, patch_size)
    query, key, value = qkv(to_patches(padded, patch_size)).chunk(3, -1)  # each (B, C, P, N*N)
    attention = ((query * scale) @ key.transpose(-2, -1)).softmax(-1).to(value.dtype)
    output = proj(_drop(attention, dropout_p) @ value)
    output = from_patches(output, patch_size, *padded.shape[1:3])[:, :height, :width]
    return (output, attention) if return_attention else output


def _drop(attention: Tensor, dropout_p: float) -> Tensor:
    # by no operator where nothing is dropped: an exported one would say that it trains
    return F.dropout(attention, dropout_p) if dropout_p else attention


def fold_weights(
    qkv_weight: Tensor, qkv_bias: Tensor | None, proj_weight: Tensor, scale: float
) -> Tensor:
    """CPSA's weights of queries and keys, and of values and outputs, multiplied with each other.

    With rows of tokens x, the scores are ``scale (x Wq^T + bq) (x Wk^T + bk)^T`` up to what is the
    same for all keys, which the softmax ignores: ``(x A + u) x^T`` with ``A = scale Wq^T Wk`` and
    ``u = scale bq Wk``. Values and outputs together are ``x M + Wp bv + bp`` with
    ``M = (Wp Wv)^T``, since attention weights sum to 1. Keys and values are then the tokens.

    Args:
        qkv_weight: (3 N*N, N*N).
        qkv_bias: (3 N*N,) or None.
        proj_weight: (N*N, N*N).
        scale: factor on ``q k^T``.

    Returns:
        (2, N*N + 1, N*N), at least float32: A with u as its last row, M with Wp bv as its last row.
    """
    dtype = torch.promote_types(qkv_weight.dtype, torch.float32)
    query, key, value = qkv_weight.to(dtype).chunk(3)
    if qkv_bias is None:
        query_bias = value_bias = query.new_zeros(len(query))
    else:
        query_bias, _, value_bias = qkv_bias.to(dtype).chunk(3)
    queries = torch.cat([query, query_bias[:, None]], 1)  # (N*N, N*N + 1)
    values = torch.cat([value, value_bias[:, None]], 1)
    return torch.stack([(scale * queries).mT @ key, values.mT @ proj_weight.to(dtype).mT])


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


def ceil_div(size: int, part: int) -> int:
    """How many parts cover a size."""
    return -(-size // part)


def num_patches(height: int, width: int, patch_size: int) -> int:
    """P, the patches (or windows) of a map whose sides are padded to multiples of N."""
    return ceil_div(height, patch_size) * ceil_div(width, patch_size)


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


def to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens (B, H*W, C) -> (B, H, W, C)."""
    # no `unflatten`, nor `movedim` below: in a trace they are not what ONNX takes them for
    return tokens.reshape(tokens.shape[0], height, width, tokens.shape[2])


def to_windows(x: Tensor, patch_size: int) -> Tensor:
    """(B, H, W, C) -> (B, windows, N*N, C): the pixels of each window, row-major."""
    return split_patches(x, patch_size).flatten(3, 4).flatten(1, 2)


def from_windows(windows: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """The inverse of `to_windows`: (B, windows, N*N, C) -> (B, H, W, C)."""
    batch, _, _, channels = windows.shape
    grid = (height // patch_size, width // patch_size)
    x = windows.reshape(batch, *grid, patch_size, patch_size, channels)
    return x.transpose(2, 3).reshape(batch, height, width, channels)


def to_patches(x: Tensor, patch_size: int) -> Tensor:
    """(B, H, W, C) -> (B, C, P, N*N): each channel's patches, their pixels row-major."""
    return split_patches(x, patch_size).permute(0, 5, 1, 2, 3, 4).flatten(4, 5).flatten(2, 3)


def from_patches(patches: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """The inverse of `to_patches`: (B, C, P, N*N) -> (B, H, W, C)."""
    return from_windows(patches.permute(0, 2, 3, 1), patch_size, height, width)


def split_patches(x: Tensor, patch_size: int) -> Tensor:
    """(B, H, W, C) as (B, H/N, W/N, N, N, C), without a copy."""
    batch, height, width, channels = x.shape
    rows, columns = height // patch_size, width // patch_size
    x = x.reshape(batch, rows, patch_size, columns, patch_size, channels)
    return x.transpose(2, 3)
