"""The MLP of a block, backward: all that the weights' gradients are products of, and that of x."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from catkernels.kernels.dense.gelu import gelu_and_slope
from catkernels.kernels.dense.launch import COUNTS, MlpProblem, mlp_backward_launch
from catkernels.kernels.dense.rows import (
    added_product,
    image_factors,
    load_matrix_columns,
    load_matrix_rows,
    load_rows,
    load_rows_again,
    normed_rows,
    product,
    row_channels,
    row_statistics,
    transposed,
    zero_sums,
)
from catkernels.kernels.launch import launched_as, on_device


@triton.jit(do_not_specialize=COUNTS)
def mlp_backward_kernel(
    x_ptr,
    grad_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    fc1_weight_ptr,
    fc1_bias_ptr,
    fc2_weight_ptr,
    factor_ptr,
    dx_ptr,
    normed_ptr,
    grad_branch_ptr,
    activated_ptr,
    dh_ptr,
    partials_ptr,
    num_rows,
    rows_per_image,
    eps,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    HIDDEN: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    ONES: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """``dx = grad + norm'(fc1^T dh)`` with ``dh = gelu'(h) fc2^T(factor grad)``, h computed again.

    Grid: (tiles of ROWS rows,).
    Writes: dx (rows, C); what the weights' gradients are products of: ``norm(x)`` and ones (rows,
    C + ONES), ``factor grad`` (rows, C), ``gelu(h)`` and ``dh`` (rows, HIDDEN); partials (tiles, 2,
    C) of the gradients of the norm's weight and bias.
    """
    dtype: tl.constexpr = fc1_weight_ptr.dtype.element_ty
    channels = row_channels(C, WIDE)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    # pieces [ROWS, WIDTH]
    x = load_rows(x_ptr, row, inside, channels, C)
    mean, rstd = row_statistics(x, eps, C)
    normed = normed_rows(x, mean, rstd, norm_weight_ptr, norm_bias_ptr, channels, dtype)
    grad_branch = _scaled(
        load_rows(grad_ptr, row, inside, channels, C),
        image_factors(factor_ptr, row, inside, rows_per_image),
        dtype,
    )
    _store_rows(normed_ptr, normed, row, inside, channels, C + ONES)
    one = C + tl.arange(0, ONES)
    ones = tl.full((ROWS, ONES), 1.0, tl.float32).to(dtype)
    tl.store(normed_ptr + row[:, None] * (C + ONES) + one[None, :], ones, mask=inside[:, None])
    _store_rows(grad_branch_ptr, grad_branch, row, inside, channels, C)
    grad_normed = zero_sums(ROWS, channels)
    for first in tl.range(0, HIDDEN, UNITS):
        unit = first + tl.arange(0, UNITS)
        fc1 = load_matrix_rows(fc1_weight_ptr, unit, channels, C)
        fc2 = load_matrix_columns(fc2_weight_ptr, unit, channels, HIDDEN)
        # [ROWS, UNITS]
        h = product(normed, transposed(fc1), PRECISION)
        if fc1_bias_ptr is not None:
            h += tl.load(fc1_bias_ptr + unit).to(tl.float32)[None, :]
        activated, slope = gelu_and_slope(h, EXACT)
        dh = (product(grad_branch, fc2, PRECISION) * slope).to(dtype)
        place = row[:, None] * HIDDEN + unit[None, :]
        tl.store(activated_ptr + place, activated.to(dtype), mask=inside[:, None])
        tl.store(dh_ptr + place, dh, mask=inside[:, None])
        grad_normed = added_product(grad_normed, dh, fc1, PRECISION)
    _store_norm_gradients(
        dx_ptr,
        partials_ptr + tl.program_id(0).to(tl.int64) * (2 * C),
        grad_normed,
        load_rows_again(x_ptr, row, inside, channels, C),
        load_rows_again(grad_ptr, row, inside, channels, C),
        norm_weight_ptr,
        mean,
        rstd,
        row,
        inside,
        channels,
        C,
    )


@triton.jit
def _scaled(x, factor, dtype: tl.constexpr):
    """Rows in pieces times a factor each, rounded to ``dtype``."""
    pieces = ()
    for i in tl.static_range(len(x)):
        pieces += ((x[i].to(tl.float32) * factor[:, None]).to(dtype),)
    return pieces


@triton.jit
def _store_rows(ptr, x, row, inside, channels, STRIDE: tl.constexpr):
    """Write rows in pieces."""
    for i in tl.static_range(len(channels)):
        place = row[:, None] * STRIDE + channels[i][None, :]
        tl.store(ptr + place, x[i], mask=inside[:, None])


@triton.jit
def _store_norm_gradients(
    dx_ptr,
    partial_ptr,
    grad_normed,
    x,
    grad,
    weight_ptr,
    mean,
    rstd,
    row,
    inside,
    channels,
    C: tl.constexpr,
):
    """Back through the norm: write ``grad + norm'(grad_normed)``, and sums for its parameters."""
    # [ROWS]
    along_ones = tl.zeros_like(mean)
    along_row = tl.zeros_like(mean)
    # pieces [ROWS, WIDTH]
    standardised = ()
    weighted = ()
    for i in tl.static_range(len(channels)):
        s = (x[i].to(tl.float32) - mean[:, None]) * rstd[:, None]
        d = grad_normed[i] * tl.load(weight_ptr + channels[i]).to(tl.float32)[None, :]
        # rows beyond the last one have no gradient
        tl.store(partial_ptr + channels[i], tl.sum(grad_normed[i] * s, 0))
        tl.store(partial_ptr + C + channels[i], tl.sum(grad_normed[i], 0))
        along_ones += tl.sum(d, 1)
        along_row += tl.sum(d * s, 1)
        standardised += (s,)
        weighted += (d,)
    along_ones *= 1.0 / C
    along_row *= 1.0 / C
    for i in tl.static_range(len(channels)):
        dx = weighted[i] - along_ones[:, None] - standardised[i] * along_row[:, None]
        dx = dx * rstd[:, None] + grad[i].to(tl.float32)
        place = row[:, None] * C + channels[i][None, :]
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=inside[:, None])


def mlp_backward(
    x: Tensor,
    grad: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    factor: Tensor | None,
    dx: Tensor,
    grad_norm: Tensor,
    normed: Tensor,
    grad_branch: Tensor,
    activated: Tensor,
    dh: Tensor,
    eps: float,
) -> None:
    """Launch `mlp_backward_kernel`, and sum what its programs give for the norm.

    Args:
        x, norm_weight, .., factor: as `mlp_forward` took them.
        grad: gradient of the output, like x.
        dx: written; like x.
        grad_norm: written; (2, C) float32, the gradients of the norm's weight and bias.
        normed: written; (rows, C + ONES), the norm's output and, behind it, a power of two of
            ones. It is in the products' dtype, as is all that follows.
        grad_branch: written; (rows, C), the gradient of what the factor is multiplied with.
        activated, dh: written; (rows, D), GELU's output, and the gradient of its input.
    """
    with on_device(x.device):
        problem = MlpProblem.of(x, fc1_weight, hidden=fc1_weight.shape[0])
        launch = launched_as(mlp_backward_launch, problem)
        tiles = triton.cdiv(problem.num_rows, launch.rows)
        partials = grad_norm.new_empty((tiles, *grad_norm.shape))
        mlp_backward_kernel[(tiles,)](
            x,
            grad,
            norm_weight,
            norm_bias,
            fc1_weight,
            fc1_bias,
            fc2_weight,
            factor,
            dx,
            normed,
            grad_branch,
            activated,
            dh,
            partials,
            problem.num_rows,
            problem.rows_per_image,
            eps,
            ONES=normed.shape[-1] - problem.channels,
            **problem.constants(),
            **launch.constants(),
        )
        torch.sum(partials, 0, out=grad_norm)
