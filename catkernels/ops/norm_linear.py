"""A layer norm and the linear layer behind it, which keep only the norm's input.

Autograd on its own keeps the input for the norm's gradient and the output for the linear layer's.
The output is cheap to compute again: one map read and one written.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from catkernels.torch_state.precision import autocast_is_on, compute_dtype


def norm_linear(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    """``linear(norm(x))``, differentiable to any order, which keeps ``x`` for the backward pass.

    Args:
        x: (.., C), in the dtype of all parameters (under autocast: any but float64).
        norm: over C.
        linear: from C to D.

    Returns:
        (.., D) in the dtype of ``x`` (under autocast, autocast's).
    """
    dtype = compute_dtype(x)
    norm_dtype = torch.float32 if autocast_is_on(x.device) else x.dtype
    inputs = (
        *_cast(norm_dtype, x, norm.weight, norm.bias),
        *_cast(dtype, linear.weight, linear.bias),
    )
    return _NormLinear.apply(*inputs, norm.eps)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(x, norm_weight, norm_bias, weight, bias, eps):
        normed, *_ = _norm(x, norm_weight, norm_bias, eps)
        return F.linear(normed.to(weight.dtype), weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, _, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad_out):
        x, norm_weight, norm_bias, weight = ctx.saved_tensors
        *needs_norm, needs_weight, needs_bias, _ = ctx.needs_input_grad
        normed, mean, rstd = _norm(x, norm_weight, norm_bias, ctx.eps)
        grad_weight = grad_bias = None
        grad_rows = grad_out.reshape(-1, grad_out.shape[-1])
        if needs_weight:
            grad_weight = grad_rows.T @ normed.to(weight.dtype).reshape(-1, x.shape[-1])
        if needs_bias:
            grad_bias = grad_rows.sum(0)
        grads_norm = (None,) * 3
        if any(needs_norm):
            grad_normed = (grad_out @ weight).to(normed.dtype)
            grads_norm = torch.ops.aten.native_layer_norm_backward(
                grad_normed, x, x.shape[-1:], mean, rstd, norm_weight, norm_bias, needs_norm
            )
        return *grads_norm, grad_weight, grad_bias, None


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def _norm(x, weight, bias, eps):
    """The norm of ``x`` over its last axis, and each row's mean and inverse deviation."""
    return torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
