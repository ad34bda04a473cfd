"""IPSA backward: the attention weights are computed again, window by window."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from catkernels.kernels.ipsa.launch import TILE, Problem, backward_launch
from catkernels.kernels.ipsa.window import (
    COUNTS,
    apart,
    bias_tile,
    dot_apart,
    head_channels,
    keep_tile,
    load_keys,
    lse_pointers,
    padding_rows,
    pixel_rows,
    window_pixels,
)
from catkernels.kernels.launch import launched_as, next_power_of_2, on_device
from catkernels.kernels.tiles import LOG2E, chunk_bounds, dot


@triton.jit(do_not_specialize=COUNTS)
def ipsa_backward_kernel(
    grad_out_ptr,
    qkv_ptr,
    table_ptr,
    qkv_bias_ptr,
    seed_ptr,
    lse_ptr,
    grad_pixels_ptr,
    bias_partial_ptr,
    num_pixels,
    scale,
    height,
    width,
    num_heads,
    num_windows,
    score_scale,
    drop_threshold,
    keep_scale,
    PATCH: tl.constexpr,
    WINDOWS: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PADDED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    SCORE_UNIT: tl.constexpr,
):
    """``dv = p^T do``, ``ds = p (do v^T - rowsum(p do v^T))``, ``dq = scale ds k``,
    ``dk = scale ds^T q``, ``dbias = ds``, with ``p = exp(s - lse)``.

    Grid: (chunks of tiles * heads,), the head fastest.
    Writes: grad_pixels (pixels, 3C), those of the map and then, where they have a bias, the padded
        ones; bias_partial (chunks, heads, TILE, TILE), ds summed over the chunk, unless None.
    """
    head = tl.program_id(0) % num_heads
    chunk = tl.program_id(0) // num_heads
    num_chunks = tl.num_programs(0) // num_heads
    channels = num_heads * HEAD_DIM
    # [TILE, TILE]
    bias = bias_tile(table_ptr, head, num_heads, PATCH, WINDOWS, TILE, SCORE_UNIT)
    if bias_partial_ptr is not None:
        bias_sum = tl.zeros([TILE, TILE], tl.float32)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    first, last = chunk_bounds(chunk, num_chunks, tl.cdiv(num_windows, WINDOWS))
    for tile in tl.range(first, last):
        windows = tl.minimum(num_windows - tile * WINDOWS, WINDOWS)
        window_pixel, offset, inside, is_token = window_pixels(
            tile, height, width, num_windows, PATCH, WINDOWS, TILE, PADDED, WIDE
        )
        qkv_rows = pixel_rows(qkv_ptr, window_pixel, offset, 3 * channels)
        do_rows = pixel_rows(grad_out_ptr, window_pixel, offset, channels)

        # [TILE, TILE]
        s = bias
        dp = tl.zeros([TILE, TILE], tl.float32)
        for first_dim in tl.range(0, HEAD_DIM, BLOCK_D, num_stages=1):
            channel, in_head = head_channels(head, first_dim, HEAD_DIM, BLOCK_D)
            k_channel, v_channel = channels + channel, 2 * channels + channel
            # [TILE, BLOCK_D]
            mask = inside[:, None] & in_head
            q = tl.load(qkv_rows[:, None] + channel, mask=mask, other=0.0)
            k = load_keys(qkv_rows, qkv_bias_ptr, k_channel, in_head, inside, is_token)
            s += dot(q, tl.trans(k), PRECISION) * score_scale
            v = load_keys(qkv_rows, qkv_bias_ptr, v_channel, in_head, inside, is_token)
            do = tl.load(do_rows[:, None] + channel, mask=mask, other=0.0)
            dp += dot(do, tl.trans(v), PRECISION)
        if lse_ptr is not None:
            # rows that hold no token get p = 0
            lse_ptrs = lse_pointers(lse_ptr, tile, head, num_heads, PATCH, WINDOWS, TILE)
            lse = tl.load(lse_ptrs, mask=is_token, other=float("inf"))
            p = tl.exp2(s * (LOG2E / SCORE_UNIT) - lse[:, None])
        else:
            s = apart(s, bias, -float("inf"), WINDOWS)
            p = tl.exp2((s - tl.max(s, 1)[:, None]) * (LOG2E / SCORE_UNIT))
            p *= (1.0 / tl.sum(p, 1))[:, None]
        p = apart(p, bias, 0.0, WINDOWS)
        dp = apart(dp, bias, 0.0, WINDOWS)
        p_dropped = p
        if seed_ptr is not None:
            keep = keep_tile(seed, drop_threshold, head, tile, PATCH, WINDOWS, TILE)
            p_dropped = tl.where(keep, p * keep_scale, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        ds = apart(ds, bias, 0.0, WINDOWS)
        if bias_partial_ptr is not None:
            bias_sum += ds

        # [TILE]
        written = inside
        if qkv_bias_ptr is not None:
            # the padded pixels' rows follow those of the map
            rows = padding_rows(tile, height, width, PATCH, WINDOWS, TILE)
            offset = tl.where(inside, offset, num_pixels - window_pixel + rows)
            written = is_token
        grad_rows = pixel_rows(grad_pixels_ptr, window_pixel, offset, 3 * channels)

        for first_dim in tl.range(0, HEAD_DIM, BLOCK_D, num_stages=1):
            # where a piece is the whole head the compiler takes q, k and do from above
            channel, in_head = head_channels(head, first_dim, HEAD_DIM, BLOCK_D)
            k_channel = channels + channel
            # [TILE, BLOCK_D]
            mask = inside[:, None] & in_head
            q = tl.load(qkv_rows[:, None] + channel, mask=mask, other=0.0)
            k = load_keys(qkv_rows, qkv_bias_ptr, k_channel, in_head, inside, is_token)
            do = tl.load(do_rows[:, None] + channel, mask=mask, other=0.0)
            grad_mask = written[:, None] & in_head
            dv = dot_apart(tl.trans(p_dropped.to(do.dtype)), do, windows, PATCH, WINDOWS, PRECISION)
            dv_ptrs = grad_rows[:, None] + 2 * channels + channel
            tl.store(dv_ptrs, dv.to(q.dtype), mask=grad_mask)
            dq = dot_apart(ds.to(q.dtype), k, windows, PATCH, WINDOWS, PRECISION) * scale
            tl.store(grad_rows[:, None] + channel, dq.to(q.dtype), mask=grad_mask)
            dk = dot_apart(tl.trans(ds.to(q.dtype)), q, windows, PATCH, WINDOWS, PRECISION) * scale
            tl.store(grad_rows[:, None] + k_channel, dk.to(q.dtype), mask=grad_mask)

    if bias_partial_ptr is not None:
        token = tl.arange(0, TILE)
        partial_ptr = bias_partial_ptr + tl.program_id(0).to(tl.int64) * (TILE * TILE)
        tl.store(partial_ptr + token[:, None] * TILE + token[None, :], bias_sum)


@triton.jit(do_not_specialize=COUNTS)
def ipsa_table_gradient_kernel(
    grad_bias_ptr,
    grad_table_ptr,
    num_heads,
    PATCH: tl.constexpr,
    WINDOWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """``dtable[dy, dx] = sum over the pairs (i, j) of a window with i - j = (dy, dx) of dbias``.

    Grid: (heads * (2N - 1),), one program per head and dy.
    Writes: grad_table ((2N - 1)**2, heads).
    """
    head = tl.program_id(0) // (2 * PATCH - 1)
    row = tl.program_id(0) % (2 * PATCH - 1)
    PIXELS: tl.constexpr = PATCH * PATCH
    # [1, TILE]
    token = tl.arange(0, TILE)[None, :]
    i = token % PIXELS
    # [BLOCK_X, 1]
    column = tl.arange(0, BLOCK_X)[:, None]
    # [BLOCK_X, TILE]
    y = i // PATCH - (row - (PATCH - 1))
    x = i % PATCH - (column - (PATCH - 1))
    mask = (y >= 0) & (y < PATCH) & (x >= 0) & (x < PATCH) & (token < WINDOWS * PIXELS)
    pair = (head * TILE + token) * TILE + (token - i) + y * PATCH + x
    grad_bias = tl.load(grad_bias_ptr + pair, mask=mask, other=0.0)
    # [BLOCK_X, 1]
    entry = tl.sum(grad_bias, 1)[:, None].to(grad_table_ptr.dtype.element_ty)
    entry_ptrs = grad_table_ptr + (row * (2 * PATCH - 1) + column) * num_heads + head
    tl.store(entry_ptrs, entry, mask=column < 2 * PATCH - 1)


def ipsa_backward(
    grad_out: Tensor,
    qkv: Tensor,
    bias_table: Tensor | None,
    qkv_bias: Tensor | None,
    seed: Tensor | None,
    lse: Tensor | None,
    grad_pixels: Tensor,
    grad_table: Tensor | None,
    num_heads: int,
    patch_size: int,
    scale: float,
    dropout_p: float,
) -> None:
    """Launch `ipsa_backward_kernel` and sum its partial results. All tensors are contiguous.

    Args:
        grad_out: (B, H, W, C), qkv's dtype.
        qkv, bias_table, qkv_bias, seed: as `ipsa_forward` took them.
        lse: as `ipsa_forward` wrote it, or None to compute it again.
        grad_pixels: written; gradients of q, k, v of every pixel of the map and then, where there
            is a qkv_bias, of every padded one: (pixels, 3C), qkv's dtype.
        grad_table: written; like bias_table, summed in float32. Or None.
    """
    with on_device(qkv.device):
        problem = Problem.of(qkv, num_heads, patch_size, scale, dropout_p)
        launch = launched_as(backward_launch, problem)
        num_chunks = launch.num_chunks(problem)
        bias_partial = None
        if grad_table is not None:
            size = (num_chunks, num_heads, TILE, TILE)
            bias_partial = qkv.new_empty(size, dtype=torch.float32)
        ipsa_backward_kernel[(num_chunks * num_heads,)](
            grad_out,
            qkv,
            bias_table,
            qkv_bias,
            seed,
            lse,
            grad_pixels,
            bias_partial,
            qkv.shape[:3].numel(),
            scale,
            **problem.arguments(),
            **launch.constants(),
        )
        if grad_table is not None:
            ipsa_table_gradient_kernel[(num_heads * (2 * patch_size - 1),)](
                bias_partial.sum(0),
                grad_table,
                num_heads,
                PATCH=patch_size,
                WINDOWS=problem.windows_per_tile,
                TILE=TILE,
                BLOCK_X=next_power_of_2(2 * patch_size - 1),
            )
