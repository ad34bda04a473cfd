"""IPSA forward: windowed attention from the qkv map straight to the output map."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from catkernels.kernels.ipsa.launch import Problem, forward_launch
from catkernels.kernels.ipsa.window import (
    COUNTS,
    apart,
    bias_tile,
    dot_apart,
    head_channels,
    keep_tile,
    load_keys,
    lse_pointers,
    pixel_rows,
    window_pixels,
)
from catkernels.kernels.launch import launched_as, on_device
from catkernels.kernels.tiles import LOG2E, chunk_bounds, dot


@triton.jit(do_not_specialize=COUNTS)
def ipsa_forward_kernel(
    qkv_ptr,
    table_ptr,
    qkv_bias_ptr,
    seed_ptr,
    out_ptr,
    lse_ptr,
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
    """``s = scale q k^T + bias``, ``o = softmax(s) v``, ``lse = log2(e) log sum exp(s)``.

    Grid: (chunks of tiles * heads,), the head fastest.
    Writes: out (B, H, W, C); lse (windows, heads, N*N) unless ``lse_ptr`` is None.
    """
    head = tl.program_id(0) % num_heads
    chunk = tl.program_id(0) // num_heads
    num_chunks = tl.num_programs(0) // num_heads
    channels = num_heads * HEAD_DIM
    # [TILE, TILE]
    bias = bias_tile(table_ptr, head, num_heads, PATCH, WINDOWS, TILE, SCORE_UNIT)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    first, last = chunk_bounds(chunk, num_chunks, tl.cdiv(num_windows, WINDOWS))
    for tile in tl.range(first, last):
        windows = tl.minimum(num_windows - tile * WINDOWS, WINDOWS)
        window_pixel, offset, inside, is_token = window_pixels(
            tile, height, width, num_windows, PATCH, WINDOWS, TILE, PADDED, WIDE
        )
        qkv_rows = pixel_rows(qkv_ptr, window_pixel, offset, 3 * channels)
        out_rows = pixel_rows(out_ptr, window_pixel, offset, channels)

        # [TILE, TILE]
        s = bias
        for first_dim in tl.range(0, HEAD_DIM, BLOCK_D, num_stages=1):
            channel, in_head = head_channels(head, first_dim, HEAD_DIM, BLOCK_D)
            # [TILE, BLOCK_D]
            q_mask = inside[:, None] & in_head
            q = tl.load(qkv_rows[:, None] + channel, mask=q_mask, other=0.0)
            k_channel = channels + channel
            k = load_keys(qkv_rows, qkv_bias_ptr, k_channel, in_head, inside, is_token)
            s += dot(q, tl.trans(k), PRECISION) * score_scale
        s = apart(s, bias, -float("inf"), WINDOWS)
        row_max = tl.max(s, 1)
        p = tl.exp2((s - row_max[:, None]) * (LOG2E / SCORE_UNIT))
        row_sum = tl.sum(p, 1)
        if lse_ptr is not None:
            lse_ptrs = lse_pointers(lse_ptr, tile, head, num_heads, PATCH, WINDOWS, TILE)
            tl.store(lse_ptrs, row_max + tl.log2(row_sum), mask=is_token)
        if seed_ptr is not None:
            keep = keep_tile(seed, drop_threshold, head, tile, PATCH, WINDOWS, TILE)
            p = tl.where(keep, p, 0.0)
            row_sum = row_sum / keep_scale

        for first_dim in tl.range(0, HEAD_DIM, BLOCK_D, num_stages=1):
            channel, in_head = head_channels(head, first_dim, HEAD_DIM, BLOCK_D)
            # [TILE, BLOCK_D]
            v_channel = 2 * channels + channel
            v = load_keys(qkv_rows, qkv_bias_ptr, v_channel, in_head, inside, is_token)
            o = dot_apart(p.to(v.dtype), v, windows, PATCH, WINDOWS, PRECISION)
            o *= (1.0 / row_sum)[:, None]
            tl.store(out_rows[:, None] + channel, o.to(v.dtype), mask=inside[:, None] & in_head)


def ipsa_forward(
    qkv: Tensor,
    bias_table: Tensor | None,
    qkv_bias: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    num_heads: int,
    patch_size: int,
    scale: float,
    dropout_p: float,
) -> None:
    """Launch `ipsa_forward_kernel`. All tensors are contiguous.

    Args:
        qkv: (B, H, W, 3C), float32, float16 or bfloat16.
        bias_table: ((2N - 1)**2, heads), of any of these dtypes, or None for no bias.
        qkv_bias: (3C,), of any of these dtypes; q, k, v of padded pixels. None is zeros.
        seed: (1,) int64, or None for no dropout.
        out: written; (B, H, W, C), qkv's dtype.
        lse: written; (windows, heads, N*N) float32, or None.
    """
    with on_device(qkv.device):
        problem = Problem.of(qkv, num_heads, patch_size, scale, dropout_p)
        launch = launched_as(forward_launch, problem)
        ipsa_forward_kernel[(launch.num_chunks(problem) * num_heads,)](
            qkv,
            bias_table,
            qkv_bias,
            seed,
            out,
            lse,
            **problem.arguments(),
            **launch.constants(),
        )
