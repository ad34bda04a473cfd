"""CPSA as PyTorch operators, one forward and one backward, and the Function that joins them."""

from __future__ import annotations

import torch
from torch import Tensor

from catkernels.ops.limits import MAX_PATCH_SIZE, map_reasons
from catkernels.ops.operator import (
    call_once_differentiable,
    contiguous,
    define_operator,
    draw_seed,
    needs_grad,
)
from catkernels.reference import fold_weights, num_patches
from catkernels.torch_state.device import (
    interpreting,
    multiplies_float32_matrices,
)
from catkernels.torch_state.precision import allows_tf32


def unsupported_reasons(
    *,
    device: torch.device,
    dtype: torch.dtype,
    patch_size: int,
    num_patches: int,
    needs_grad: bool = True,
) -> list[str]:
    """Why the kernels cannot serve such a call; empty where they can.

    Args:
        dtype: what the call computes with and returns.
        num_patches: P, of the padded map.
        needs_grad: whether there will be a backward pass.
    """
    reasons = map_reasons(device, dtype, patch_size)
    # one patch of less than 8 x 8 pixels takes two products only
    attends = num_patches > 1 or patch_size == MAX_PATCH_SIZE
    if needs_grad and dtype == torch.float32 and attends and not interpreting():
        # without matrix instructions the terms of exact products spill
        exact = torch.version.hip is not None or not allows_tf32()
        if exact and not multiplies_float32_matrices(device):
            reasons.append(
                "the backward pass of more than one patch in float32, or of one of 8 x 8 pixels, "
                "needs TF32 products or CDNA: exact ones do not fit in other devices' registers "
                "(torch.backends.cuda.matmul.fp32_precision is not 'tf32', or nothing to AMD's)"
            )
    return reasons


def cpsa_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    patch_size: int,
    scale: float,
    dropout_p: float,
    dtype: torch.dtype,
) -> Tensor:
    """`catkernels.reference.cpsa_attention` by kernels, with arguments that were checked.

    What is not finite stays in its image; from 2 to 64 patches it may reach other channels there.

    Args:
        x: map (B, H, W, C) with any strides; in float32 it is rounded to ``dtype`` as it is read.
        dtype: what the kernels compute with and return.
    """
    weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)
    seed = draw_seed(dropout_p, x.device)
    problem = (seed, patch_size, scale, dropout_p, dtype)
    if not needs_grad(x, *weights):
        return torch.ops.catkernels.cpsa_forward(x, *weights, *problem)
    with torch.autocast(x.device.type, enabled=False):
        folded = fold_weights(qkv_weight, qkv_bias, proj_weight, scale)
        # apart from the layer's own: what is compiled takes no tensor twice
        bias = None if proj_bias is None else proj_bias.float().view_as(proj_bias)
    return _Attention.apply(x, folded, bias, *weights, *problem)


class _Attention(torch.autograd.Function):
    """The forward operator, differentiated by the backward operator.

    It takes the weights twice: its output is made of the layers' own, as without gradients, to the
    same bits; the gradients go to those that autograd has folded.
    """

    @staticmethod
    def forward(*inputs):
        # by one name: PyTorch looks at the signature in every call
        x, _, _, *arguments = inputs
        return torch.ops.catkernels.cpsa_forward(x, *arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, folded, *_, seed, ctx.patch_size, _, ctx.dropout_p, _ = inputs
        ctx.save_for_backward(x, folded, seed)

    @staticmethod
    def backward(ctx, grad):
        needs_x, needs_folded, needs_bias, *_ = ctx.needs_input_grad
        x_grad, folded_grad, bias_grad = call_once_differentiable(
            torch.ops.catkernels.cpsa_backward,
            "cpsa_attention",
            grad,
            *ctx.saved_tensors,
            ctx.patch_size,
            ctx.dropout_p,
            needs_x,
            needs_folded or needs_bias,
        )
        return (
            x_grad if needs_x else None,
            folded_grad if needs_folded else None,
            bias_grad if needs_bias else None,
            *(None,) * 9,
        )


def _forward(x, *arguments):
    out = _forward_output(x, *arguments)
    if out.numel():
        from catkernels.kernels.cpsa.forward import cpsa_forward

        *weights, seed, patch_size, scale, dropout_p, _ = arguments
        cpsa_forward(*contiguous(x, *weights), seed, out, patch_size, scale, dropout_p)
    return out


def _forward_output(x, *arguments):
    """The map (B, H, W, C), not written yet."""
    *_, dtype = arguments
    return x.new_empty(x.shape, dtype=dtype)


def _backward(grad, x, folded, seed, patch_size, dropout_p, needs_x, needs_weights):
    grads = _backward_outputs(grad, x, folded, seed, patch_size, dropout_p, needs_x, needs_weights)
    x_grad, folded_grad, bias_grad = grads
    if x.numel():
        from catkernels.kernels.cpsa.backward import cpsa_backward

        cpsa_backward(
            *contiguous(grad, x),
            folded,
            seed,
            x_grad if needs_x else None,
            folded_grad if needs_weights else None,
            bias_grad if needs_weights else None,
            patch_size,
            dropout_p,
        )
    else:
        folded_grad.zero_()
        bias_grad.zero_()
    return grads


def _backward_outputs(grad, x, folded, seed, patch_size, dropout_p, needs_x, needs_weights):
    """Gradients of x, of the folded weights and of the bias, not written yet; empty if not needed.

    The bias is (N*N,).
    """
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        folded.new_empty(folded.shape if needs_weights else (0,)),
        folded.new_empty(folded.shape[2:] if needs_weights else (0,)),
    )


def _forward_flops(
    x_shape, qkv_shape, qkv_bias, proj_shape, proj_bias, seed, patch_size, *arguments, **_
) -> int:
    return forward_flops(x_shape, patch_size)


def forward_flops(x_shape: torch.Size, patch_size: int) -> int:
    """Queries, scores, their products with the tokens, and outputs; of one patch, outputs only.

    The fold is left out: it is the same for a map of any size.
    """
    patches, with_matrix, with_tokens = _product_flops(x_shape, patch_size)
    return with_matrix if patches == 1 else 2 * with_matrix + 2 * with_tokens


def _backward_flops(grad_shape, x_shape, folded_shape, seed, patch_size, *arguments, **_) -> int:
    """The forward pass again but its outputs, and two products for each of its factors."""
    patches, with_matrix, with_tokens = _product_flops(x_shape, patch_size)
    return 2 * with_matrix if patches == 1 else 5 * with_matrix + 6 * with_tokens


def _product_flops(x_shape: torch.Size, patch_size: int) -> tuple[int, int, int]:
    """P, and the FLOPs of a product of all tokens with a matrix, and with one another."""
    batch, height, width, channels = x_shape
    patches = num_patches(height, width, patch_size)
    tokens = batch * channels * patches
    return patches, 2 * tokens * patch_size**4, 2 * tokens * patches * patch_size**2


define_operator(
    "cpsa_forward(Tensor x, Tensor qkv_weight, Tensor? qkv_bias, Tensor proj_weight, "
    "Tensor? proj_bias, Tensor? seed, int patch_size, float scale, float dropout_p, "
    "ScalarType dtype) -> Tensor",
    _forward,
    _forward_output,
    _forward_flops,
)
define_operator(
    "cpsa_backward(Tensor grad, Tensor x, Tensor folded, Tensor? seed, int patch_size, "
    "float dropout_p, bool needs_x, bool needs_weights) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_outputs,
    _backward_flops,
)
