"""A layer norm as operators, and a Function that takes its backward pass and a residual's as one.

In ``x + branch(norm(x))`` two gradients reach ``x``: through the norm, and around it. Autograd on
its own writes the first and then adds the second. Here the norm gives ``x`` as well as
``norm(x)``; what goes around it takes that ``x``, and both gradients come back together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from catkernels.ops.limits import tensor_reasons
from catkernels.ops.operator import (
    call_once_differentiable,
    contiguous,
    define_operator,
    needs_grad,
)
from catkernels.torch_state.device import device_reasons
from catkernels.torch_state.precision import compute_dtype

CHANNEL_STEP, MAX_CHANNELS = 8, 1024


def unsupported_reasons(
    *, device: torch.device, dtypes: set[torch.dtype], channels: int
) -> list[str]:
    """Why the kernels cannot norm such rows; empty where they can.

    Args:
        dtypes: of the rows, the weights and the result.
        channels: C, the values of a row.
    """
    reasons = device_reasons(device) + tensor_reasons(dtypes)
    if channels % CHANNEL_STEP or not 0 < channels <= MAX_CHANNELS:
        reasons.append(
            f"the kernels norm up to {MAX_CHANNELS} channels in steps of {CHANNEL_STEP}, "
            f"not {channels}"
        )
    return reasons


def norm_residual(x: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """``norm(x)`` and ``x``, whose gradients come back in one pass.

    Args:
        x: (.., C), float32, float16 or bfloat16.
        norm: over C, with weights.

    Returns:
        (.., C) in the dtype that a linear layer behind it computes with, and ``x`` itself.
    """
    inputs = (x, norm.weight, norm.bias, norm.eps, compute_dtype(x))
    if needs_grad(*inputs[:3]):
        return _Norm.apply(*inputs)
    return torch.ops.catkernels.norm_forward(*inputs), x


class _Norm(torch.autograd.Function):
    """The forward operator and its input, differentiated by the backward operator."""

    @staticmethod
    def forward(*inputs):
        # by one name: PyTorch looks at the signature in every call, which takes as long as a launch
        x, *_ = inputs
        return torch.ops.catkernels.norm_forward(*inputs), x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, ctx.eps, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias)

    @staticmethod
    def backward(ctx, grad_normed, grad_x):
        if grad_normed is None:
            return grad_x, *(None,) * 4
        x, weight, bias = ctx.saved_tensors
        dx, grad_weight, grad_bias, _ = norm_backward(
            grad_normed, grad_x, x, weight, bias, ctx.eps, ctx.needs_input_grad[1:3]
        )
        return dx, grad_weight, grad_bias, None, None


def norm_backward(
    grad_normed: Tensor,
    grad_x: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    needs_parameters: tuple[bool, bool],
    needs_normed: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias, and the norm's output in the dtype of its gradient.

    Args:
        grad_normed: gradient of the norm's output, (.., C).
        grad_x: what reaches x around the norm, or None.
        needs_parameters: whether weight and bias need a gradient.
    """
    dx, grad_parameters, normed = call_once_differentiable(
        torch.ops.catkernels.norm_backward,
        "a block's norms",
        grad_normed,
        grad_x,
        x,
        weight,
        bias,
        eps,
        any(needs_parameters),
        needs_normed,
    )
    of_parameters = parameter_gradients(grad_parameters, weight, bias, needs_parameters)
    return dx, *of_parameters, normed if needs_normed else None


def parameter_gradients(
    gradients: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a norm's weight and bias, those that are needed, from (2, C) in float32."""
    needs_weight, needs_bias = needed
    return (
        gradients[0].to(weight.dtype) if needs_weight else None,
        gradients[1].to(bias.dtype) if bias is not None and needs_bias else None,
    )


def _forward(x, weight, bias, eps, dtype):
    out = _forward_outputs(x, weight, bias, eps, dtype)
    if out.numel():
        from catkernels.kernels.dense.norm import norm_forward

        norm_forward(*contiguous(x, weight, bias), out, eps)
    return out


def _forward_outputs(x, weight, bias, eps, dtype):
    """The norm's output, not written yet."""
    return x.new_empty(x.shape, dtype=dtype)


def _backward(grad_normed, grad_x, x, weight, bias, eps, needs_parameters, needs_normed):
    outputs = _backward_outputs(
        grad_normed, grad_x, x, weight, bias, eps, needs_parameters, needs_normed
    )
    dx, grad_parameters, normed = outputs
    if dx.numel():
        from catkernels.kernels.dense.norm import norm_backward

        norm_backward(
            *contiguous(x, grad_normed, grad_x, weight, bias),
            dx,
            grad_parameters if needs_parameters else None,
            normed if needs_normed else None,
            eps,
        )
    else:
        grad_parameters.zero_()
    return outputs


def _backward_outputs(grad_normed, grad_x, x, weight, bias, eps, needs_parameters, needs_normed):
    """Gradients of x and, (2, C), of weight and bias; the norm's output. Empty if not needed."""
    parameters = (2, x.shape[-1]) if needs_parameters else (0,)
    return (
        x.new_empty(x.shape),
        x.new_empty(parameters, dtype=torch.float32),
        grad_normed.new_empty(x.shape if needs_normed else (0,)),
    )


def no_products(*shapes, **_) -> int:
    """FLOPs are those of products, of which a norm has none."""
    return 0


define_operator(
    "norm_forward(Tensor x, Tensor weight, Tensor? bias, float eps, ScalarType dtype) -> Tensor",
    _forward,
    _forward_outputs,
    no_products,
)
define_operator(
    "norm_backward(Tensor grad_normed, Tensor? grad_x, Tensor x, Tensor weight, Tensor? bias, "
    "float eps, bool needs_parameters, bool needs_normed) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_outputs,
    no_products,
)
