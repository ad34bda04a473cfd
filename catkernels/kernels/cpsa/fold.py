"""CPSA's own weights folded and prepared for the forward pass, at once.

As operations of PyTorch (`catkernels.reference.fold_weights`) the fold is a dozen launches, which
take longer than the attention of a single image. They are left to calls with gradients, whose
backward pass starts from the folded weights and ends at the layers' own through autograd.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from catkernels.kernels.cpsa.tiles import PIXELS
from catkernels.kernels.cpsa.weights import empty_weights, pixels_on_grid, store_weights


@triton.jit
def cpsa_fold_weights_kernel(
    qkv_weight_ptr,
    qkv_bias_ptr,
    proj_weight_ptr,
    proj_bias_ptr,
    matrices_ptr,
    constants_ptr,
    scale,
    PATCH: tl.constexpr,
    VALUE_ROWS: tl.constexpr,
):
    """A = scale Wq^T Wk with u = scale Wk^T bq, and M = Wv^T Wp^T with Wp bv: `store_weights`.

    Multiplied in float32 whatever the weights' dtypes and torch's setting for products are, since
    A and M are rounded afterwards. By sums of outer products: where factors come of half precision,
    a product instruction of some devices would take them for that after they were scaled.

    Grid: (2,), the scores' weights and the values'.
    Writes: matrices_ptr (2, 64, 64), constants_ptr (4, 64) up to the powers in its last row.
    """
    side: tl.constexpr = PATCH * PATCH
    kind = tl.program_id(0)
    pixel, real = pixels_on_grid(PATCH)
    # the queries' rows, or the values', which are the third part
    left_ptr = qkv_weight_ptr + kind * (2 * side * side)
    left_scale = tl.where(kind == 0, scale, 1.0)
    # [PIXELS, PIXELS]
    matrix = tl.zeros((PIXELS, PIXELS), tl.float32)
    # [PIXELS]
    constant = tl.zeros((PIXELS,), tl.float32)
    for first in range(0, side, PATCH):
        # some at a time, whose loads are all under way before the first is waited for
        for step in tl.static_range(PATCH):
            inner = first + step
            # [PIXELS]
            left = tl.load(left_ptr + inner * side + pixel, mask=real, other=0.0)
            left = left.to(tl.float32) * left_scale
            if kind == 0:
                right_ptr = qkv_weight_ptr + (side + inner) * side
                right = tl.load(right_ptr + pixel, mask=real, other=0.0).to(tl.float32)
            else:
                right_ptr = proj_weight_ptr + inner
                right = tl.load(right_ptr + pixel * side, mask=real, other=0.0).to(tl.float32)
            matrix += left[:, None] * right[None, :]
            if qkv_bias_ptr is not None:
                left_bias = tl.load(qkv_bias_ptr + kind * (2 * side) + inner)
                constant += (left_bias.to(tl.float32) * left_scale) * right
    bias = tl.zeros((PIXELS,), tl.float32)
    if proj_bias_ptr is not None:
        bias = tl.load(proj_bias_ptr + pixel, mask=real, other=0.0).to(tl.float32)
    store_weights(matrix, constant, bias, kind, matrices_ptr, constants_ptr, PATCH, VALUE_ROWS)


def fold_weights(
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    scale: float,
    patch_size: int,
    dtype: torch.dtype,
    value_rows: Literal["out", "values"],
) -> tuple[Tensor, Tensor]:
    """The matrices (2, 64, 64) in ``dtype`` and the float32 constants (4, 64) of weights.

    Args:
        qkv_weight, qkv_bias, proj_weight, proj_bias: contiguous, each of any dtype up to float32.
    """
    matrices, constants = empty_weights(qkv_weight, dtype)
    cpsa_fold_weights_kernel[(2,)](
        qkv_weight,
        qkv_bias,
        proj_weight,
        proj_bias,
        matrices,
        constants,
        scale,
        PATCH=patch_size,
        VALUE_ROWS=value_rows,
        num_warps=8,
    )
    return matrices, constants
