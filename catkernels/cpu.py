"""Both attentions on a CPU without gradients: the reference's results, in a fraction of its time.

A slice of the batch that stays in cache is taken through the whole attention at once, so no
reshaped tensor is ever written to memory, and the result goes straight into the output map.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from catkernels.reference import (
    fold_weights,
    pad_to_patches,
    relative_position_index,
    split_patches,
)
from catkernels.torch_state.modes import is_observed
from catkernels.torch_state.transforms import is_transformed

# The bytes of queries, keys and values that one slice of the batch works with, for each thread.
# From 1 to 4 MiB all stages of CAT are within a few percent of their best on a Xeon with 2 MiB of
# L2 cache; the whole batch at once is up to 1.4x slower, single images of stage 4 up to 1.2x.
SLICE_BYTES = 2 * 2**20
# Above this many bytes of queries, keys and values an IPSA layer slices its linears too: memory for
# tensors of this size comes fresh from the system, page by page, at half the speed of the rest.
LARGE_BYTES = 16 * 2**20


def serves(x: Tensor, *others: Tensor | None, dropout_p: float, return_attention: bool) -> bool:
    """Whether these functions can stand in for the reference.

    They must not while a graph is recorded, for it shall serve any batch, nor where a mode or a
    tensor of another class sees the operations, which are to be the reference's, nor within
    transforms, which differentiate or batch what is done in place here, nor with dropout, which
    checkpointing must be able to repeat with the reference. Half precision and mixed dtypes are
    left to the reference, whose roundings are its own.
    """
    tensors = [tensor for tensor in (x, *others) if tensor is not None]
    return (
        all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
        and x.device.type == "cpu"
        and x.numel() > 0
        and x.dtype in (torch.float32, torch.float64)
        and all(tensor.dtype == x.dtype for tensor in tensors)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and not (dropout_p or return_attention)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not is_transformed()
        and not is_observed()
    )


def ipsa_attention(
    qkv: Tensor,
    bias_table: Tensor | None,
    *,
    num_heads: int,
    patch_size: int,
    scale: float | None,
    qkv_bias: Tensor | None,
) -> Tensor:
    """`catkernels.reference.ipsa_attention` through PyTorch's own fused attention."""
    batch, height, width, _ = qkv.shape
    channels = qkv.shape[-1] // 3
    if height % patch_size == 0 and qkv.is_contiguous():
        # windows know nothing of each other, so a row of them can count as an image: finer slices
        qkv = qkv.view(-1, patch_size, width, 3 * channels)
    bias = None if bias_table is None else _relative_position_bias(bias_table, patch_size)
    output = qkv.new_empty(*qkv.shape[:3], channels)
    for images in _slices(qkv, channels_of_qkv=3 * channels):
        windows = split_patches(pad_to_patches(qkv[images], patch_size, qkv_bias), patch_size)
        tokens = windows.reshape(-1, patch_size**2, 3, num_heads, channels // num_heads)
        query, key, value = tokens.permute(2, 0, 3, 1, 4)  # each (windows, heads, N*N, D)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
        _write(attended.transpose(1, 2).reshape(*windows.shape[:-1], channels), output[images])
    return output.view(batch, height, width, channels)


def cpsa_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    patch_size: int,
    scale: float | None,
) -> Tensor:
    """`catkernels.reference.cpsa_attention` with folded weights: keys and values are the map."""
    scale = 1 / patch_size if scale is None else scale
    scores_folded, output_folded = fold_weights(qkv_weight, qkv_bias, proj_weight, scale)
    score_weight, score_bias = scores_folded[:-1], scores_folded[-1]
    out_weight, out_bias = output_folded[:-1], output_folded[-1]
    if proj_bias is not None:
        out_bias = out_bias + proj_bias

    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    for images in _slices(x, channels_of_qkv=3 * x.shape[-1]):
        windows = split_patches(pad_to_patches(x[images], patch_size), patch_size)
        patches = attended = _channels_first(windows)  # (B*C, P, N*N)
        if patches.shape[1] != 1:
            query = torch.mm(patches.flatten(0, 1), score_weight).add_(score_bias)
            scores = torch.bmm(query.view_as(patches), patches.transpose(1, 2))
            attended = torch.bmm(scores.softmax(-1), patches)
        joined = torch.mm(attended.flatten(0, 1), out_weight).add_(out_bias)
        by_channel = (windows.shape[0], windows.shape[-1], *windows.shape[1:-1])
        _write(joined.view(by_channel).movedim(1, -1), output[images])
    return output


def _channels_first(windows: Tensor) -> Tensor:
    """Windows (B, H/N, W/N, N, N, C) as the patches of each channel, (B*C, P, N*N)."""
    batch, rows, columns, side, _, channels = windows.shape
    pixels = windows.reshape(batch, -1, channels)
    patches = pixels.new_empty(batch, channels, pixels.shape[1])
    for image, target in zip(pixels, patches, strict=True):
        # PyTorch transposes a matrix block by block, but a batch of them value by value
        target.copy_(image.T)
    return patches.view(batch * channels, rows * columns, side**2)


def layer_in_slices(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``layer(x)`` for an IPSA layer that keeps the shape of a map, in slices where x is large."""
    if 3 * x.numel() * x.element_size() <= LARGE_BYTES:
        return layer(x)
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    for images in _slices(x, channels_of_qkv=3 * x.shape[-1]):
        output[images] = layer(x[images])
    return output


def _relative_position_bias(bias_table: Tensor, patch_size: int) -> Tensor:
    """The reference's bias as (1, heads, N*N, N*N), which the fused attention asks for."""
    index = torch.from_numpy(_relative_position_index(patch_size))
    # transposed before it is looked up in: the pairs are 14 times as many as the entries
    by_head = bias_table.t().contiguous().index_select(1, index)
    return by_head.view(1, -1, patch_size**2, patch_size**2)


@functools.cache
def _relative_position_index(patch_size: int) -> np.ndarray:
    """The flattened index, as an array: no tracing or fake mode can leave its mark in the cache."""
    return relative_position_index(patch_size, torch.device("cpu")).flatten().numpy()


def _slices(x: Tensor, channels_of_qkv: int) -> Iterator[slice]:
    """Slices of the batch of a map (B, H, W, ..) whose q, k and v stay in cache."""
    image_bytes = x.shape[1] * x.shape[2] * channels_of_qkv * x.element_size()
    images = max(1, SLICE_BYTES * torch.get_num_threads() // image_bytes)
    for start in range(0, x.shape[0], images):
        yield slice(start, start + images)


def _write(windows: Tensor, output: Tensor) -> None:
    """Windows (B, H/N, W/N, N, N, C) into the map (B, H, W, C), without what padded it."""
    batch, rows, columns, side, _, channels = windows.shape
    height, width = output.shape[1:3]
    padded = (height, width) != (rows * side, columns * side)
    target = output.new_empty(batch, rows * side, columns * side, channels) if padded else output
    split_patches(target, side).copy_(windows)
    if padded:
        output.copy_(target[:, :height, :width])
