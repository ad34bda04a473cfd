"""CPSA with the norm before and the residual behind it as one operator, for inference.

The norm needs one pass of its own, for the statistics of each pixel: all channels of a pixel take
part in them, of which a tile of CPSA's has a few. The rest is done where CPSA reads and writes: the
norm's output is never written, nor the branch that the residual is added to.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from catkernels.ops.cpsa import forward_flops
from catkernels.ops.limits import (
    MAX_PATCH_SIZE,
    half_product_reasons,
    one_of,
    tensor_reasons,
)
from catkernels.ops.operator import contiguous, define_operator
from catkernels.torch_state.precision import compute_dtype

# The channels whose statistics a kernel takes, in one or two tiles.
CHANNELS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
# Of more patches the kernel spills.
MAX_PATCHES = 16


def joined_reasons(
    *,
    products: torch.dtype,
    parameters: set[torch.dtype],
    channels: int,
    patch_size: int,
    num_patches: int,
) -> list[str]:
    """Why no kernel joins CPSA with its norm and residual; empty where one does.

    Args:
        products: the dtype that the attention computes with.
        parameters: the dtypes of the attention's parameters.
        channels: C, which the norm is over.
        num_patches: P, of the padded map.
    """
    reasons = half_product_reasons(products) + tensor_reasons(parameters)
    if channels not in CHANNELS:
        reasons.append(f"CPSA joins its norm over {one_of(CHANNELS)} channels, not {channels}")
    if patch_size >= MAX_PATCH_SIZE:
        reasons.append(f"CPSA joins its norm for patches of less than 8 x 8, not of {patch_size}")
    if not 1 <= num_patches <= MAX_PATCHES:
        reasons.append(f"CPSA joins its norm for 1 to {MAX_PATCHES} patches, not {num_patches}")
    return reasons


def cpsa_residual(
    x: Tensor,
    norm: nn.LayerNorm,
    qkv: nn.Linear,
    proj: nn.Linear,
    factor: Tensor | None,
    *,
    patch_size: int,
    scale: float,
) -> Tensor:
    """``x + factor CPSA(norm(x))``, without a backward pass.

    Args:
        x: map (B, H, W, C), float32, float16 or bfloat16.
        norm: over C, with weights.
        qkv, proj: CPSA's layers, (3 N*N, N*N) and (N*N, N*N).
        factor: (B,), what each image's branch is multiplied with; None: nothing is dropped.

    Returns:
        Like x.
    """
    weights = (norm.weight, norm.bias, qkv.weight, qkv.bias, proj.weight, proj.bias)
    return torch.ops.catkernels.cpsa_residual(
        x, *weights, factor, norm.eps, patch_size, scale, compute_dtype(x)
    )


def _operator(x, *arguments):
    out = _output(x)
    if out.numel():
        from catkernels.kernels.cpsa.forward import cpsa_residual
        from catkernels.kernels.dense.norm import row_statistics

        *tensors, eps, patch_size, scale, dtype = arguments
        x, *tensors = contiguous(x, *tensors)
        statistics = x.new_empty((*x.shape[:-1], 2), dtype=torch.float32)
        row_statistics(x, statistics, eps)
        cpsa_residual(x, statistics, *tensors, out, patch_size, scale, dtype)
    return out


def _output(x, *arguments):
    """The map (B, H, W, C), not written yet."""
    return x.new_empty(x.shape)


def _flops(
    x_shape,
    norm_weight_shape,
    norm_bias_shape,
    qkv_weight_shape,
    qkv_bias_shape,
    proj_weight_shape,
    proj_bias_shape,
    factor_shape,
    eps,
    patch_size,
    *_,
    **__,
) -> int:
    """CPSA's: the norm and the residual have no products."""
    return forward_flops(x_shape, patch_size)


define_operator(
    "cpsa_residual(Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor qkv_weight, "
    "Tensor? qkv_bias, Tensor proj_weight, Tensor? proj_bias, Tensor? factor, float eps, "
    "int patch_size, float scale, ScalarType dtype) -> Tensor",
    _operator,
    _output,
    _flops,
)
