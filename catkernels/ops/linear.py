"""Linear layers of a block with what stands beside them: a norm before, or a residual behind.

One kernel computes both where rows are short enough: the norm's output is never written, nor the
branch that the residual is added to. Elsewhere PyTorch's products are as fast, and the residual
with DropPath's factor is one pass of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from catkernels.ops import norm as norms
from catkernels.ops.limits import half_product_reasons, one_of
from catkernels.ops.operator import contiguous, define_operator, needs_grad
from catkernels.torch_state.precision import compute_dtype

# The channels that a kernel holds as one or two tiles, and how many features of the other side of a
# linear layer it takes at once.
CHANNELS = (32, 64, 96, 128, 192)
STEP = 32


def joined_reasons(
    *, products: torch.dtype, channels: int, features: int, step: int = STEP
) -> list[str]:
    """Why no kernel joins a linear layer with what stands beside it; empty where one does.

    Args:
        products: the dtype that the layer computes with.
        channels: of the rows, which the norm or the residual is of.
        features: of the layer's other side.
        step: how many of them a kernel takes at once.
    """
    reasons = half_product_reasons(products)
    if channels not in CHANNELS:
        reasons.append(f"the kernels multiply {one_of(CHANNELS)} channels, not {channels}")
    if features % step:
        reasons.append(f"the kernels multiply with features in steps of {step}, not {features}")
    return reasons


def norm_linear_residual(
    x: Tensor, norm: nn.LayerNorm, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``norm(x) weight^T + bias`` and ``x``, whose gradients come back in one pass.

    Only ``x`` is kept for the backward pass, which computes the norm again as it goes through it.

    Args:
        x: (.., C), float32, float16 or bfloat16.
        norm: over C, with weights.
        weight, bias: of a linear layer from C to D, (D, C) and (D,), or no bias.

    Returns:
        (.., D) in the dtype that the linear layer computes with, and ``x`` itself.
    """
    tensors = (x, norm.weight, norm.bias, weight, bias)
    if needs_grad(*tensors):
        return _NormLinear.apply(*tensors, norm.eps, compute_dtype(x))
    return _norm_linear(*tensors, norm.eps, compute_dtype(x)), x


def linear_residual(
    x: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor | None
) -> Tensor:
    """``x + factor (inputs weight^T + bias)`` by one kernel.

    Args:
        x: (B, .., C), float32, float16 or bfloat16.
        inputs: (B, .., K), in the dtype that the linear layer computes with.
        weight, bias: of a linear layer from K to C, (C, K) and (C,), or no bias.
        factor: (B,), what each image's branch is multiplied with; None: nothing is dropped.

    Returns:
        Like x.
    """
    tensors = (x, inputs, weight, bias)
    if needs_grad(*tensors):
        return _LinearResidual.apply(*tensors, factor)
    return _LinearResidual.forward(*tensors, factor)


def add_branch(x: Tensor, branch: Tensor, factor: Tensor | None) -> Tensor:
    """``x + factor branch``, each way in one pass over the map.

    Args:
        x: (B, .., C).
        branch: like x; under autocast in half precision.
        factor: (B,) in the dtype of ``branch``, what each image's branch is multiplied with. None:
            nothing is dropped.

    Returns:
        Like x.
    """
    if factor is None:
        return x + branch
    return _AddBranch.apply(x, branch, factor)


class _NormLinear(torch.autograd.Function):
    """A norm and a linear layer: one operator, or two; back through both, the norm again."""

    @staticmethod
    def forward(x, *arguments):
        return _norm_linear(x, *arguments), x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, bias, ctx.eps, ctx.dtype = inputs
        # the parameters and no casts of them: what shards a model frees those and not these
        ctx.save_for_backward(*tensors)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_out, grad_x):
        if grad_out is None:
            return grad_x, *(None,) * 6
        x, norm_weight, norm_bias, weight = ctx.saved_tensors
        _, *needs_norm, needs_weight, needs_bias, _, _ = ctx.needs_input_grad
        *grads_of_norm, normed = norms.norm_backward(
            grad_out @ weight.to(ctx.dtype),
            grad_x,
            x,
            norm_weight,
            norm_bias,
            ctx.eps,
            needs_norm,
            needs_normed=needs_weight,
        )
        return (
            *grads_of_norm,
            None if normed is None else weight_gradient(grad_out, normed, weight.dtype),
            bias_gradient(grad_out, ctx.bias_dtype) if needs_bias else None,
            None,
            None,
        )


class _LinearResidual(torch.autograd.Function):
    """The operator; its backward pass is PyTorch's products with the gradient of the branch."""

    @staticmethod
    def forward(*arguments):
        x, inputs, weight, bias, factor = arguments
        weight = weight.to(inputs.dtype)
        return torch.ops.catkernels.linear_residual(x, inputs, weight, bias, factor)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, inputs, weight, bias, factor = inputs
        ctx.save_for_backward(inputs, weight, factor)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx, grad):
        inputs, weight, factor = ctx.saved_tensors
        _, needs_inputs, needs_weight, needs_bias, _ = ctx.needs_input_grad
        branch = branch_gradient(grad, factor, inputs.dtype)
        return (
            grad,
            branch @ weight.to(inputs.dtype) if needs_inputs else None,
            weight_gradient(branch, inputs, weight.dtype) if needs_weight else None,
            bias_gradient(branch, ctx.bias_dtype) if needs_bias else None,
            None,
        )


class _AddBranch(torch.autograd.Function):
    """`torch.addcmul` of mixed dtypes: autocast and autograd on their own would copy for those."""

    @staticmethod
    def forward(*inputs):
        # by one name: PyTorch looks at the signature in every call, which takes as long as a launch
        x, branch, factor = inputs
        with torch.autocast(x.device.type, enabled=False):
            return torch.addcmul(x, branch, per_image(factor, x))

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, branch, factor = inputs
        ctx.dtype = branch.dtype
        ctx.save_for_backward(factor)

    @staticmethod
    def backward(ctx, grad):
        (factor,) = ctx.saved_tensors
        return grad, branch_gradient(grad, factor, ctx.dtype), None


def branch_gradient(grad: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The gradient of a branch in ``dtype``, from that of ``x + factor branch``."""
    if factor is None:
        return grad.to(dtype)
    if grad.dtype == dtype or torch.is_grad_enabled():
        # what is given a place for its result cannot be differentiated
        return (grad * per_image(factor, grad)).to(dtype)
    return torch.mul(grad, per_image(factor, grad), out=torch.empty_like(grad, dtype=dtype))


def per_image(factor: Tensor, x: Tensor) -> Tensor:
    """A factor (B,) as one for each value of ``x`` (B, ..)."""
    return factor.view(-1, *(1,) * (x.dim() - 1))


def weight_gradient(grad: Tensor, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """That of a linear layer's weight, from the gradient of its output and its inputs."""
    return (grad.flatten(0, -2).T @ inputs.flatten(0, -2)).to(dtype)


def bias_gradient(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """That of a linear layer's bias, from the gradient of its output; PyTorch adds in float32."""
    return grad.flatten(0, -2).sum(0, dtype=dtype)


def _norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """``norm(x) weight^T + bias`` in a dtype, by one kernel where one serves."""
    features, channels = weight.shape
    weight = weight.to(dtype)
    reasons = joined_reasons(products=dtype, channels=channels, features=features)
    # what does not fit is PyTorch's to refuse
    if not reasons and channels == x.shape[-1]:
        return torch.ops.catkernels.norm_linear(x, norm_weight, norm_bias, weight, bias, eps)
    normed = torch.ops.catkernels.norm_forward(x, norm_weight, norm_bias, eps, dtype)
    return F.linear(normed, weight, None if bias is None else bias.to(dtype))


def _norm_linear_operator(x, norm_weight, norm_bias, weight, bias, eps):
    out = _norm_linear_output(x, norm_weight, norm_bias, weight, bias, eps)
    if out.numel():
        from catkernels.kernels.dense.linear import norm_linear

        norm_linear(*contiguous(x, norm_weight, norm_bias, weight, bias), out, eps)
    return out


def _norm_linear_output(x, norm_weight, norm_bias, weight, *arguments):
    """The layer's output, not written yet."""
    return weight.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_residual_operator(x, inputs, weight, bias, factor):
    out = _linear_residual_output(x, inputs, weight, bias, factor)
    if out.numel():
        from catkernels.kernels.dense.linear import linear_residual

        linear_residual(*contiguous(x, inputs, weight, bias, factor), out)
    return out


def _linear_residual_output(x, *arguments):
    """The map, not written yet."""
    return x.new_empty(x.shape)


def _norm_linear_flops(x_shape, norm_shape, norm_bias_shape, weight_shape, *_, **__) -> int:
    """A product with the weight for each row."""
    return 2 * x_shape[:-1].numel() * weight_shape.numel()


def _linear_residual_flops(x_shape, inputs_shape, weight_shape, *_, **__) -> int:
    """A product with the weight for each row."""
    return 2 * x_shape[:-1].numel() * weight_shape.numel()


define_operator(
    "norm_linear(Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor weight, Tensor? bias, "
    "float eps) -> Tensor",
    _norm_linear_operator,
    _norm_linear_output,
    _norm_linear_flops,
)
define_operator(
    "linear_residual(Tensor x, Tensor inputs, Tensor weight, Tensor? bias, Tensor? factor) "
    "-> Tensor",
    _linear_residual_operator,
    _linear_residual_output,
    _linear_residual_flops,
)
