"""Linear layers of a block with what stands beside them: the norm before, the residual behind."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from catkernels.kernels.dense.launch import (
    COUNTS,
    LinearProblem,
    linear_residual_launch,
    norm_linear_launch,
)
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
def norm_linear_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    eps,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """``y = norm(x) weight^T + bias`` of each row.

    Grid: (tiles of ROWS rows,).
    Writes: out (rows, FEATURES).
    """
    channels = row_channels(C, WIDE)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    # pieces [ROWS, WIDTH]
    x = load_rows(x_ptr, row, inside, channels, C)
    mean, rstd = row_statistics(x, eps, C)
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    normed = normed_rows(x, mean, rstd, norm_weight_ptr, norm_bias_ptr, channels, dtype)
    for first in tl.range(0, FEATURES, STEP):
        feature = first + tl.arange(0, STEP)
        weight = load_matrix_rows(weight_ptr, feature, channels, C)
        # [ROWS, STEP]
        y = product(normed, transposed(weight), PRECISION)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + feature).to(tl.float32)[None, :]
        place = row[:, None] * FEATURES + feature[None, :]
        tl.store(out_ptr + place, y.to(dtype), mask=inside[:, None])


@triton.jit(do_not_specialize=COUNTS)
def linear_residual_kernel(
    x_ptr,
    input_ptr,
    weight_ptr,
    bias_ptr,
    factor_ptr,
    out_ptr,
    num_rows,
    rows_per_image,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """``x + factor (input weight^T + bias)`` of each row; the input's are FEATURES long.

    Grid: (tiles of ROWS rows,).
    Writes: out (rows, C).
    """
    channels = row_channels(C, WIDE)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    # pieces [ROWS, WIDTH]
    branch = zero_sums(ROWS, channels)
    for first in tl.range(0, FEATURES, STEP):
        feature = first + tl.arange(0, STEP)
        place = row[:, None] * FEATURES + feature[None, :]
        # [ROWS, STEP]
        some = tl.load(input_ptr + place, mask=inside[:, None], other=0.0)
        weight = load_matrix_columns(weight_ptr, feature, channels, FEATURES)
        branch = added_product(branch, some, transposed(weight), PRECISION)
    store_residual(
        out_ptr, x_ptr, branch, bias_ptr, factor_ptr, row, inside, channels, rows_per_image, C
    )


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    eps: float,
) -> None:
    """Launch `norm_linear_kernel`. All tensors are contiguous.

    Args:
        x: (.., C), float32, float16 or bfloat16.
        norm_weight, norm_bias, bias: of any of these dtypes; no bias is zeros.
        weight: (D, C), in the dtype of the products.
        out: written; (.., D), like the weight.
    """
    with on_device(x.device):
        problem = LinearProblem.of(x, weight, features=weight.shape[0])
        launch = launched_as(norm_linear_launch, problem)
        norm_linear_kernel[(triton.cdiv(problem.num_rows, launch.rows),)](
            x,
            norm_weight,
            norm_bias,
            weight,
            bias,
            out,
            problem.num_rows,
            eps,
            **problem.constants(),
            **launch.constants(),
        )


def linear_residual(
    x: Tensor,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,
    out: Tensor,
) -> None:
    """Launch `linear_residual_kernel`. All tensors are contiguous.

    Args:
        x: (B, .., C), float32, float16 or bfloat16.
        inputs: (B, .., K), in the dtype of the products.
        weight: (C, K), in the dtype of the products.
        bias: (C,), of any of these dtypes; no bias is zeros.
        factor: (B,), of any of these dtypes, what each image's branch is multiplied with, or None.
        out: written; like x.
    """
    with on_device(x.device):
        problem = LinearProblem.of(x, weight, features=weight.shape[1])
        launch = launched_as(linear_residual_launch, problem)
        linear_residual_kernel[(triton.cdiv(problem.num_rows, launch.rows),)](
            x,
            inputs,
            weight,
            bias,
            factor,
            out,
            problem.num_rows,
            problem.rows_per_image,
            **problem.constants(),
            **launch.constants(),
        )
