"""Layer norm of rows, and its backward pass with the gradient that goes around it added."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from catkernels.kernels.dense.launch import COUNTS, NORM_PROGRAMS, NormProblem, norm_launch
from catkernels.kernels.dense.rows import load_rows, row_channels
from catkernels.kernels.dense.rows import row_statistics as statistics_of_rows
from catkernels.kernels.launch import launched_as, on_device
from catkernels.kernels.tiles import chunk_bounds


@triton.jit(do_not_specialize=COUNTS)
def norm_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``y = (x - mean) / sqrt(var + eps) weight + bias`` of each row.

    Grid: (tiles of ROWS rows,).
    Writes: out (rows, C).
    """
    place, mask, channel, is_channel = _tile(tl.program_id(0), num_rows, C, BLOCK_C, ROWS)
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    y, _ = _standardised(x, is_channel, eps, C)
    y *= _channel_values(weight_ptr, channel, is_channel)
    if bias_ptr is not None:
        y += _channel_values(bias_ptr, channel, is_channel)
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def row_statistics_kernel(
    x_ptr,
    statistics_ptr,
    num_rows,
    eps,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``mean`` and ``1 / sqrt(var + eps)`` of each row, for what norms where it reads.

    Grid: (tiles of ROWS rows,).
    Writes: statistics (rows, 2), float32.
    """
    channels = row_channels(C, WIDE)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    # [ROWS]
    mean, rstd = statistics_of_rows(load_rows(x_ptr, row, inside, channels, C), eps, C)
    tl.store(statistics_ptr + row * 2, mean, mask=inside)
    tl.store(statistics_ptr + row * 2 + 1, rstd, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def norm_backward_kernel(
    x_ptr,
    grad_normed_ptr,
    grad_x_ptr,
    weight_ptr,
    bias_ptr,
    dx_ptr,
    normed_ptr,
    partials_ptr,
    num_rows,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``dx = grad_x + (d - mean(d) - s mean(d s)) rstd`` with ``d = weight grad_normed``.

    ``s`` is the standardised row, computed again from x. ``grad_x`` came around the norm; None: no
    gradient did.

    Grid: (chunks of tiles of ROWS rows,).
    Writes: dx (rows, C); normed (rows, C), the norm's output, unless None; partials (chunks, 2, C)
    of the gradients of weight and bias, unless None.
    """
    first, last = chunk_bounds(tl.program_id(0), tl.num_programs(0), tl.cdiv(num_rows, ROWS))
    # [BLOCK_C]
    weight_sum = tl.zeros([BLOCK_C], tl.float32)
    bias_sum = tl.zeros([BLOCK_C], tl.float32)
    for tile in tl.range(first, last):
        # [ROWS, BLOCK_C]
        place, mask, channel, is_channel = _tile(tile, num_rows, C, BLOCK_C, ROWS)
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(grad_normed_ptr + place, mask=mask, other=0.0).to(tl.float32)
        standardised, rstd = _standardised(x, is_channel, eps, C)
        weight = _channel_values(weight_ptr, channel, is_channel)
        if normed_ptr is not None:
            normed = standardised * weight
            if bias_ptr is not None:
                normed += _channel_values(bias_ptr, channel, is_channel)
            tl.store(normed_ptr + place, normed.to(normed_ptr.dtype.element_ty), mask=mask)
        if partials_ptr is not None:
            # rows beyond the last one have no gradient
            weight_sum += tl.sum(d * standardised, 0)
            bias_sum += tl.sum(d, 0)
        d *= weight
        along_ones = tl.sum(d, 1) / C
        along_row = tl.sum(d * standardised, 1) / C
        dx = (d - along_ones[:, None] - standardised * along_row[:, None]) * rstd[:, None]
        if grad_x_ptr is not None:
            dx += tl.load(grad_x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if partials_ptr is not None:
        channel = tl.arange(0, BLOCK_C)
        partials_ptr += tl.program_id(0).to(tl.int64) * (2 * C)
        tl.store(partials_ptr + channel, weight_sum, mask=channel < C)
        tl.store(partials_ptr + C + channel, bias_sum, mask=channel < C)


@triton.jit
def _tile(tile, num_rows, C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr):
    """Places of a tile's values and which of them are there [ROWS, BLOCK_C]; the channels."""
    channel = tl.arange(0, BLOCK_C)
    is_channel = channel < C
    row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = (row < num_rows)[:, None] & is_channel[None, :]
    return row[:, None] * C + channel[None, :], mask, channel, is_channel


@triton.jit
def _standardised(x, is_channel, eps, C: tl.constexpr):
    """``(x - mean) / sqrt(var + eps)`` of each row, and the inverse deviations [ROWS]."""
    mean = tl.sum(x, 1) / C
    centred = tl.where(is_channel[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    return centred * rstd[:, None], rstd


@triton.jit
def _channel_values(ptr, channel, is_channel):
    """A value for each channel, [1, BLOCK_C], float32."""
    return tl.load(ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]


def norm_forward(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, eps: float) -> None:
    """Launch `norm_forward_kernel`. All tensors are contiguous, of float32, float16 or bfloat16.

    Args:
        x: (.., C).
        weight, bias: (C,); no bias is zeros.
        out: written; as x, of any of these dtypes.
    """
    with on_device(x.device):
        problem = NormProblem.of(x)
        launch = launched_as(norm_launch, problem)
        norm_forward_kernel[(triton.cdiv(problem.num_rows, launch.rows),)](
            x, weight, bias, out, **problem.arguments(eps), **launch.constants()
        )


def row_statistics(x: Tensor, statistics: Tensor, eps: float) -> None:
    """Launch `row_statistics_kernel`. Both tensors are contiguous.

    Args:
        x: (.., C), float32, float16 or bfloat16; C is the sum of two powers of two, or one.
        statistics: written; (.., 2), float32.
    """
    with on_device(x.device):
        problem = NormProblem.of(x)
        launch = launched_as(norm_launch, problem)
        row_statistics_kernel[(triton.cdiv(problem.num_rows, launch.rows),)](
            x,
            statistics,
            problem.num_rows,
            eps,
            C=problem.channels,
            WIDE=problem.wide,
            **launch.constants(),
        )


def norm_backward(
    x: Tensor,
    grad_normed: Tensor,
    grad_x: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dx: Tensor,
    grad_parameters: Tensor | None,
    normed: Tensor | None,
    eps: float,
) -> None:
    """Launch `norm_backward_kernel`. All tensors are contiguous, of float32, float16 or bfloat16.

    Args:
        x, grad_normed, grad_x: (.., C); no ``grad_x`` is zeros.
        weight, bias: (C,); no bias is zeros.
        dx: written; as x.
        grad_parameters: written; (2, C) float32, the gradients of weight and bias, or None.
        normed: written; as x, of any of these dtypes, or None.
    """
    with on_device(x.device):
        problem = NormProblem.of(x)
        launch = launched_as(norm_launch, problem)
        chunks = min(triton.cdiv(problem.num_rows, launch.rows), NORM_PROGRAMS)
        partials = None
        if grad_parameters is not None:
            partials = grad_parameters.new_empty((chunks, *grad_parameters.shape))
        norm_backward_kernel[(chunks,)](
            x,
            grad_normed,
            grad_x,
            weight,
            bias,
            dx,
            normed,
            partials,
            **problem.arguments(eps),
            **launch.constants(),
        )
        if partials is not None:
            torch.sum(partials, 0, out=grad_parameters)
