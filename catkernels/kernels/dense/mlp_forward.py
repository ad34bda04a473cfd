"""The MLP of a block, forward: the map is read and written once, and nothing between is written."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from catkernels.kernels.dense.gelu import gelu
from catkernels.kernels.dense.launch import COUNTS, MlpProblem, mlp_forward_launch
from catkernels.kernels.dense.rows import (
    added_product,
    load_matrix_columns,
    load_matrix_rows,
    load_rows,
    normed_rows,
    product,
    row_channels,
    row_statistics,
    store_residual,
    transposed,
    zero_sums,
)
from catkernels.kernels.launch import launched_as, on_device


@triton.jit(do_not_specialize=COUNTS)
def mlp_forward_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    fc1_weight_ptr,
    fc1_bias_ptr,
    fc2_weight_ptr,
    fc2_bias_ptr,
    factor_ptr,
    out_ptr,
    num_rows,
    rows_per_image,
    eps,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    HIDDEN: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """``x + factor fc2(gelu(fc1(norm(x))))``, the weights fetched anew for each tile.

    Grid: (tiles of ROWS rows,).
    Writes: out (rows, C).
    """
    dtype: tl.constexpr = fc1_weight_ptr.dtype.element_ty
    channels = row_channels(C, WIDE)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    # pieces [ROWS, WIDTH]
    x = load_rows(x_ptr, row, inside, channels, C)
    mean, rstd = row_statistics(x, eps, C)
    normed = normed_rows(x, mean, rstd, norm_weight_ptr, norm_bias_ptr, channels, dtype)
    branch = zero_sums(ROWS, channels)
    for first in tl.range(0, HIDDEN, UNITS):
        unit = first + tl.arange(0, UNITS)
        fc1 = load_matrix_rows(fc1_weight_ptr, unit, channels, C)
        fc2 = load_matrix_columns(fc2_weight_ptr, unit, channels, HIDDEN)
        activated = _activated(normed, fc1, fc1_bias_ptr, unit, EXACT, PRECISION)
        branch = added_product(branch, activated, transposed(fc2), PRECISION)
    store_residual(
        out_ptr, x_ptr, branch, fc2_bias_ptr, factor_ptr, row, inside, channels, rows_per_image, C
    )


@triton.jit(do_not_specialize=COUNTS)
def mlp_resident_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    fc1_weight_ptr,
    fc1_bias_ptr,
    fc2_weight_ptr,
    fc2_bias_ptr,
    factor_ptr,
    out_ptr,
    num_rows,
    rows_per_image,
    eps,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    HIDDEN: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """What `mlp_forward_kernel` computes, both weights in shared memory from tile to tile.

    Grid: (programs,), each takes every programs-th tile of ROWS rows.
    Writes: out (rows, C).
    """
    dtype: tl.constexpr = fc1_weight_ptr.dtype.element_ty
    channels = row_channels(C, WIDE)
    # slices of UNITS hidden values, each in pieces
    fc1 = ()
    fc2 = ()
    for i in tl.static_range(HIDDEN // UNITS):
        unit = i * UNITS + tl.arange(0, UNITS)
        fc1 += (load_matrix_rows(fc1_weight_ptr, unit, channels, C),)
        fc2 += (load_matrix_columns(fc2_weight_ptr, unit, channels, HIDDEN),)
    num_tiles = tl.cdiv(num_rows, ROWS)
    # what does not change from tile to tile is not to be moved to registers
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), disable_licm=True):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = row < num_rows
        # pieces [ROWS, WIDTH]
        x = load_rows(x_ptr, row, inside, channels, C)
        mean, rstd = row_statistics(x, eps, C)
        normed = normed_rows(x, mean, rstd, norm_weight_ptr, norm_bias_ptr, channels, dtype)
        branch = zero_sums(ROWS, channels)
        for i in tl.static_range(HIDDEN // UNITS):
            unit = i * UNITS + tl.arange(0, UNITS)
            activated = _activated(normed, fc1[i], fc1_bias_ptr, unit, EXACT, PRECISION)
            branch = added_product(branch, activated, transposed(fc2[i]), PRECISION)
        store_residual(
            out_ptr,
            x_ptr,
            branch,
            fc2_bias_ptr,
            factor_ptr,
            row,
            inside,
            channels,
            rows_per_image,
            C,
        )


@triton.jit
def _activated(normed, fc1, fc1_bias_ptr, unit, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """``gelu(fc1(normed))`` of some hidden units, [ROWS, UNITS], in the dtype of the weights."""
    h = product(normed, transposed(fc1), PRECISION)
    if fc1_bias_ptr is not None:
        h += tl.load(fc1_bias_ptr + unit).to(tl.float32)[None, :]
    return gelu(h, EXACT).to(fc1[0].dtype)


def mlp_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    factor: Tensor | None,
    out: Tensor,
    eps: float,
) -> None:
    """Launch `mlp_forward_kernel` or `mlp_resident_kernel`. All tensors are contiguous.

    Args:
        x: (B, .., C), float32, float16 or bfloat16.
        norm_weight, norm_bias, fc1_bias, fc2_bias: of any of these dtypes; no bias is zeros.
        fc1_weight, fc2_weight: (D, C) and (C, D), in the dtype of the products.
        factor: (B,), of any of these dtypes, what each image's branch is multiplied with, or None.
        out: written; like x.
    """
    with on_device(x.device):
        problem = MlpProblem.of(x, fc1_weight, hidden=fc1_weight.shape[0])
        launch = launched_as(mlp_forward_launch, problem)
        kernel, programs = mlp_forward_kernel, triton.cdiv(problem.num_rows, launch.rows)
        if launch.resident_programs:
            kernel, programs = mlp_resident_kernel, min(programs, launch.resident_programs)
        kernel[(programs,)](
            x,
            norm_weight,
            norm_bias,
            fc1_weight,
            fc1_bias,
            fc2_weight,
            fc2_bias,
            factor,
            out,
            problem.num_rows,
            problem.rows_per_image,
            eps,
            **problem.constants(),
            **launch.constants(),
        )
