"""The MLP of a block with its norm and residual: ``x + factor fc2(gelu(fc1(norm(x))))``.

One kernel computes all of it where rows are short enough, and keeps nothing but ``x``. Elsewhere
PyTorch's products are as fast, and kernels only join what stands between them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from catkernels.ops import norm as norms
from catkernels.ops.linear import (
    add_branch,
    bias_gradient,
    branch_gradient,
    joined_reasons,
    norm_linear_residual,
    weight_gradient,
)
from catkernels.ops.operator import (
    call_once_differentiable,
    contiguous,
    define_operator,
    needs_grad,
)
from catkernels.torch_state.precision import compute_dtype

# How many hidden units a kernel takes at once.
HIDDEN_STEP = 64
# The channels for which a kernel of the backward pass has registers.
BACKWARD_CHANNELS = (32, 64, 96)
# Columns of ones beside the norm's output, whose product then has fc1's bias gradient as well. They
# are as many as keep rows aligned to 16 bytes.
ONES = 8


def fused_reasons(*, products: torch.dtype, shape: torch.Size) -> list[str]:
    """Why no single kernel serves such an MLP, whose norm kernels take; empty where one does.

    Args:
        products: the dtype that the linear layers compute with.
        shape: (D, C), of the first linear layer's weight.
    """
    hidden, channels = shape
    return joined_reasons(products=products, channels=channels, features=hidden, step=HIDDEN_STEP)


def fused_mlp(
    x: Tensor, norm: nn.LayerNorm, fc1: nn.Linear, fc2: nn.Linear, factor: Tensor | None
) -> Tensor:
    """``x + factor fc2(gelu(fc1(norm(x))))`` by one kernel, which keeps ``x`` for its gradients.

    Args:
        x: (B, .., C), float32, float16 or bfloat16.
        norm: over C, with weights.
        fc1, fc2: from C to D hidden units, and back.
        factor: (B,), what each image's branch is multiplied with; None: nothing is dropped.

    Returns:
        Like x.
    """
    tensors = (x, norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    if needs_grad(*tensors):
        return _FusedMlp.apply(*tensors, factor, norm.eps, compute_dtype(x))
    return _FusedMlp.forward(*tensors, factor, norm.eps, compute_dtype(x))


def split_mlp(
    x: Tensor, norm: nn.LayerNorm, fc1: nn.Linear, fc2: nn.Linear, factor: Tensor | None
) -> Tensor:
    """The same by PyTorch's products. Kept are ``x``, the hidden units, and GELU of them."""
    h, x = norm_linear_residual(x, norm, fc1.weight)
    return add_branch(x, fc2(bias_gelu(h, fc1.bias)), factor)


def bias_gelu(h: Tensor, bias: Tensor | None) -> Tensor:
    """``gelu(h + bias)``, whose backward pass gives the bias's gradient without one of its own.

    Args:
        h: (.., D), float32, float16 or bfloat16.
        bias: (D,), of any of these dtypes, or None.

    Returns:
        Like h.
    """
    if needs_grad(h, bias):
        return _BiasGelu.apply(h, bias)
    return torch.ops.catkernels.bias_gelu(h, bias)


class _FusedMlp(torch.autograd.Function):
    """The forward operator; the backward pass computes all but ``x`` again."""

    @staticmethod
    def forward(*inputs):
        # by one name: PyTorch looks at the signature in every call, which takes as long as a launch
        *tensors, fc1_weight, fc1_bias, fc2_weight, fc2_bias, factor, eps, dtype = inputs
        weights = (fc1_weight.to(dtype), fc1_bias, fc2_weight.to(dtype), fc2_bias)
        return torch.ops.catkernels.mlp_forward(*tensors, *weights, factor, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, fc2_bias, factor, ctx.eps, ctx.dtype = inputs
        # the parameters and no casts of them: what shards a model frees those and not these
        ctx.save_for_backward(*tensors, factor)
        ctx.fc2_bias_dtype = None if fc2_bias is None else fc2_bias.dtype

    @staticmethod
    def backward(ctx, grad):
        # once: checkpointing recomputes what it unpacks
        saved = ctx.saved_tensors
        _, _, _, needs_fc1, _, needs_fc2, *_ = ctx.needs_input_grad
        # where only x learns, products take less than the kernel
        by_kernel = saved[0].shape[-1] in BACKWARD_CHANNELS and needs_fc1 and needs_fc2
        gradients = (_by_one_kernel if by_kernel else _by_products)(ctx, grad, *saved)
        return *gradients, None, None, None


def _by_one_kernel(
    ctx, grad, x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, factor
) -> tuple[Tensor | None, ...]:
    """The gradients of x and the six parameters: a kernel, and a product for each weight."""
    _, *needs_norm, _, needs_fc1_bias, _, needs_fc2_bias, _, _, _ = ctx.needs_input_grad
    dx, grad_norm, normed, grad_branch, activated, dh = call_once_differentiable(
        torch.ops.catkernels.mlp_backward,
        "a block's MLP",
        grad,
        x,
        norm_weight,
        norm_bias,
        fc1_weight.to(ctx.dtype),
        fc1_bias,
        fc2_weight.to(ctx.dtype),
        factor,
        ctx.eps,
    )
    grad_fc1 = dh.T @ normed
    return (
        dx,
        *norms.parameter_gradients(grad_norm, norm_weight, norm_bias, needs_norm),
        grad_fc1[:, :-ONES].to(fc1_weight.dtype),
        grad_fc1[:, -1].to(fc1_bias.dtype) if needs_fc1_bias else None,
        weight_gradient(grad_branch, activated, fc2_weight.dtype),
        bias_gradient(grad_branch, ctx.fc2_bias_dtype) if needs_fc2_bias else None,
    )


def _by_products(
    ctx, grad, x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, factor
) -> tuple[Tensor | None, ...]:
    """The gradients of x and the six parameters by PyTorch's products, and what joins them."""
    _, *needs_norm, needs_fc1, needs_fc1_bias, needs_fc2, needs_fc2_bias, _, _, _ = (
        ctx.needs_input_grad
    )
    fc1, fc2 = fc1_weight.to(ctx.dtype), fc2_weight.to(ctx.dtype)
    normed = torch.ops.catkernels.norm_forward(x, norm_weight, norm_bias, ctx.eps, ctx.dtype)
    grad_branch = branch_gradient(grad, factor, ctx.dtype)
    dh, grad_fc1_bias, activated = _bias_gelu_backward(
        grad_branch @ fc2, F.linear(normed, fc1), fc1_bias, needs_fc1_bias, needs_fc2
    )
    grads_of_norm = norms.norm_backward(
        dh @ fc1, grad, x, norm_weight, norm_bias, ctx.eps, needs_norm
    )
    return (
        *grads_of_norm[:3],
        weight_gradient(dh, normed, fc1_weight.dtype) if needs_fc1 else None,
        grad_fc1_bias,
        weight_gradient(grad_branch, activated, fc2_weight.dtype)
        if activated is not None
        else None,
        bias_gradient(grad_branch, ctx.fc2_bias_dtype) if needs_fc2_bias else None,
    )


class _BiasGelu(torch.autograd.Function):
    """The operator, differentiated by the backward operator."""

    @staticmethod
    def forward(*inputs):
        return torch.ops.catkernels.bias_gelu(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        h, bias = ctx.saved_tensors
        dh, grad_bias, _ = _bias_gelu_backward(grad, h, bias, ctx.needs_input_grad[1])
        return dh, grad_bias


def _bias_gelu_backward(
    grad: Tensor, h: Tensor, bias: Tensor | None, needs_bias: bool, needs_output: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of ``h`` and ``bias``, and ``gelu(h + bias)`` again."""
    dh, grad_bias, output = call_once_differentiable(
        torch.ops.catkernels.bias_gelu_backward,
        "a block's MLP",
        grad,
        h,
        bias,
        needs_bias,
        needs_output,
    )
    grad_bias = grad_bias.to(bias.dtype) if bias is not None and needs_bias else None
    return dh, grad_bias, output if needs_output else None


def _forward(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, factor, eps):
    parameters = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    out = _forward_output(x, *parameters, factor, eps)
    if out.numel():
        from catkernels.kernels.dense.mlp_forward import mlp_forward

        mlp_forward(*contiguous(x, *parameters, factor), out, eps)
    return out


def _forward_output(x, *arguments):
    """The map, not written yet."""
    return x.new_empty(x.shape)


def _backward(grad, x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, factor, eps):
    parameters = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight)
    outputs = _backward_outputs(grad, x, *parameters, factor, eps)
    if x.numel():
        from catkernels.kernels.dense.mlp_backward import mlp_backward

        mlp_backward(*contiguous(x, grad, *parameters, factor), *outputs, eps)
    else:
        outputs[1].zero_()
    return outputs


def _backward_outputs(grad, x, norm_weight, norm_bias, fc1_weight, *arguments):
    """What `mlp_backward` of the kernels writes, not written yet."""
    count, (hidden, channels) = x.shape[:-1].numel(), fc1_weight.shape
    return (
        x.new_empty(x.shape),
        x.new_empty((2, channels), dtype=torch.float32),
        *(fc1_weight.new_empty((count, n)) for n in (channels + ONES, channels, hidden, hidden)),
    )


def _gelu(h, bias):
    out = _gelu_output(h, bias)
    if out.numel():
        from catkernels.kernels.dense.bias_gelu import bias_gelu

        bias_gelu(*contiguous(h, bias), out)
    return out


def _gelu_output(h, bias):
    """The activated units, not written yet."""
    return h.new_empty(h.shape)


def _gelu_backward(grad, h, bias, needs_bias, needs_output):
    outputs = _gelu_backward_outputs(grad, h, bias, needs_bias, needs_output)
    dh, grad_bias, output = outputs
    if dh.numel():
        from catkernels.kernels.dense.bias_gelu import bias_gelu_backward

        bias_gelu_backward(
            *contiguous(grad, h, bias),
            dh,
            output if needs_output else None,
            grad_bias if needs_bias else None,
        )
    else:
        grad_bias.zero_()
    return outputs


def _gelu_backward_outputs(grad, h, bias, needs_bias, needs_output):
    """Gradients of h and the bias, and the output again, not written yet; empty if not needed."""
    return (
        h.new_empty(h.shape),
        h.new_empty(h.shape[-1:] if needs_bias else (0,), dtype=torch.float32),
        h.new_empty(h.shape if needs_output else (0,)),
    )


def _forward_flops(x_shape, norm_shape, norm_bias_shape, fc1_shape, *arguments, **_) -> int:
    """Two products with a weight for each row."""
    return 2 * 2 * x_shape[:-1].numel() * fc1_shape[0] * fc1_shape[1]


def _backward_flops(grad_shape, x_shape, norm_shape, norm_bias_shape, fc1_shape, *_, **__) -> int:
    """Three products for each row: the first again, and back through both."""
    return _forward_flops(x_shape, norm_shape, norm_bias_shape, fc1_shape) // 2 * 3


define_operator(
    "mlp_forward(Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor fc1_weight, "
    "Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, Tensor? factor, float eps) -> Tensor",
    _forward,
    _forward_output,
    _forward_flops,
)
define_operator(
    "mlp_backward(Tensor grad, Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor fc1_weight, "
    "Tensor? fc1_bias, Tensor fc2_weight, Tensor? factor, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_outputs,
    _backward_flops,
)
define_operator(
    "bias_gelu(Tensor h, Tensor? bias) -> Tensor", _gelu, _gelu_output, norms.no_products
)
define_operator(
    "bias_gelu_backward(Tensor grad, Tensor h, Tensor? bias, bool needs_bias, bool needs_output) "
    "-> (Tensor, Tensor, Tensor)",
    _gelu_backward,
    _gelu_backward_outputs,
    norms.no_products,
)
