"""IPSA as PyTorch operators, one forward and one backward, and the Function that joins them."""

from __future__ import annotations

import torch
from torch import Tensor

from catkernels.ops.limits import map_reasons
from catkernels.ops.operator import (
    call_once_differentiable,
    contiguous,
    define_operator,
    draw_seed,
    needs_grad,
)
from catkernels.reference import num_patches

MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 128


def unsupported_reasons(
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    patch_size: int,
    needs_grad: bool = True,
) -> list[str]:
    """Why the kernels cannot serve such a call; empty where they can.

    Args:
        dtype: what the call computes with and returns.
        needs_grad: as of `cpsa.unsupported_reasons`; here the backward pass takes what the forward
            pass takes.
    """
    reasons = map_reasons(device, dtype, patch_size)
    if head_dim % 8 or not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        reasons.append(
            f"the kernels take head dimensions from {MIN_HEAD_DIM} to {MAX_HEAD_DIM} "
            f"in steps of 8, not {head_dim}"
        )
    return reasons


def ipsa_attention(
    qkv: Tensor,
    bias_table: Tensor | None,
    qkv_bias: Tensor | None,
    *,
    num_heads: int,
    patch_size: int,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Inner-patch self-attention by the kernels, differentiable in all three tensors.

    Args:
        qkv: (B, H, W, 3C), float32, float16 or bfloat16, any strides.
        bias_table: ((2N - 1)**2, heads), of any of these dtypes, or None.
        qkv_bias: (3C,), of any of these dtypes, or None; of use only where the map is padded.
        dropout_p: probability of dropping an attention weight, rounded to multiples of 2**-16.

    Returns:
        The map (B, H, W, C) in qkv's dtype.
    """
    # where nothing is padded the bias is in no result, and so in no graph
    padded = qkv.shape[1] % patch_size or qkv.shape[2] % patch_size
    tensors = (qkv, bias_table, qkv_bias if padded else None)
    seed = draw_seed(dropout_p, qkv.device)
    problem = (num_heads, patch_size, scale, dropout_p)
    if needs_grad(*tensors):
        return _Attention.apply(*tensors, seed, *problem)[0]
    return torch.ops.catkernels.ipsa_forward(*tensors, seed, False, *problem)[0]


class _Attention(torch.autograd.Function):
    """The forward operator, differentiated by the backward operator."""

    @staticmethod
    def forward(*inputs):
        # by one name: PyTorch looks at the signature in every call, a tenth of the call's time
        qkv, bias_table, qkv_bias, seed, *problem = inputs
        # it saves the backward pass a reduction, but in float32 its rounding would show there
        save_lse = qkv.dtype != torch.float32
        return torch.ops.catkernels.ipsa_forward(
            qkv, bias_table, qkv_bias, seed, save_lse, *problem
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        qkv, bias_table, qkv_bias, seed, *ctx.problem = inputs
        _, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(qkv, bias_table, qkv_bias, seed, lse)

    @staticmethod
    def backward(ctx, grad_out, _):
        if grad_out is None:
            return (None,) * 8
        # once: checkpointing recomputes what it unpacks
        saved = ctx.saved_tensors
        qkv, _, qkv_bias, *_ = saved
        _, needs_table, needs_qkv_bias, *_ = ctx.needs_input_grad
        grad_pixels, grad_table = call_once_differentiable(
            torch.ops.catkernels.ipsa_backward,
            "ipsa_attention",
            grad_out,
            *saved,
            needs_table,
            *ctx.problem,
        )
        pixels = qkv.shape[:-1].numel()
        grad_qkv = grad_pixels[:pixels].view(qkv.shape)
        grad_qkv_bias = None
        if needs_qkv_bias:
            grad_qkv_bias = grad_pixels[pixels:].sum(0, dtype=torch.float32).to(qkv_bias.dtype)
        return grad_qkv, grad_table if needs_table else None, grad_qkv_bias, *(None,) * 5


# The operators end in the arguments of a problem: num_heads, patch_size, scale and dropout_p.


def _forward(qkv, bias_table, qkv_bias, seed, save_lse, *problem):
    out, lse = _forward_outputs(qkv, bias_table, qkv_bias, seed, save_lse, *problem)
    if out.numel():
        from catkernels.kernels.ipsa.forward import ipsa_forward

        tensors = contiguous(qkv, bias_table, qkv_bias)
        ipsa_forward(*tensors, seed, out, lse if save_lse else None, *problem)
    return out, lse


def _forward_outputs(qkv, bias_table, qkv_bias, seed, save_lse, *problem):
    """The map (B, H, W, C) and the log-sum-exp (windows, heads, N*N), not written yet."""
    num_heads, patch_size, *_ = problem
    windows = _num_windows(qkv.shape, patch_size) if save_lse else 0
    out = qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))
    return out, qkv.new_empty((windows, num_heads, patch_size**2), dtype=torch.float32)


def _backward(grad_out, qkv, bias_table, qkv_bias, seed, lse, needs_table, *problem):
    tensors = (grad_out, qkv, bias_table, qkv_bias)
    grad_pixels, grad_table = _backward_outputs(*tensors, seed, lse, needs_table, *problem)
    if grad_pixels.numel():
        from catkernels.kernels.ipsa.backward import ipsa_backward

        ipsa_backward(
            *contiguous(*tensors),
            seed,
            lse if lse.numel() else None,
            grad_pixels,
            grad_table if needs_table else None,
            *problem,
        )
    else:
        grad_table.zero_()
    return grad_pixels, grad_table


def _backward_outputs(grad_out, qkv, bias_table, qkv_bias, seed, lse, needs_table, *problem):
    """Gradients of q, k, v (pixels, 3C) and of the table, not written yet; empty if not needed.

    The pixels are those of the map and then, where they have a bias, the padded ones.
    """
    _, patch_size, *_ = problem
    pixels = qkv.shape[0] * qkv.shape[1] * qkv.shape[2]
    if qkv_bias is not None:
        pixels = _num_windows(qkv.shape, patch_size) * patch_size**2
    grad_table = bias_table.new_empty(bias_table.shape) if needs_table else qkv.new_empty(0)
    return qkv.new_empty((pixels, qkv.shape[3])), grad_table


def _num_windows(shape: torch.Size, patch_size: int) -> int:
    """Windows of a batch of maps (B, H, W, 3C), those that reach beyond a map included."""
    batch, height, width, _ = shape
    return batch * num_patches(height, width, patch_size)


def _forward_flops(qkv_shape, *arguments, **_) -> int:
    """Two products with the windows' N*N x N*N weights, padded pixels included."""
    patch_size = arguments[-3]  # of what ends in patch_size, scale, dropout_p
    return 2 * 2 * _num_windows(qkv_shape, patch_size) * patch_size**4 * (qkv_shape[3] // 3)


def _backward_flops(grad_shape, qkv_shape, *arguments, **_) -> int:
    """Five products: the scores again, and one for each factor of the forward pass's two."""
    return _forward_flops(qkv_shape, *arguments) // 2 * 5


_PROBLEM = "int num_heads, int patch_size, float scale, float dropout_p"
define_operator(
    "ipsa_forward(Tensor qkv, Tensor? bias_table, Tensor? qkv_bias, Tensor? seed, "
    f"bool save_lse, {_PROBLEM}) -> (Tensor, Tensor)",
    _forward,
    _forward_outputs,
    _forward_flops,
)
define_operator(
    "ipsa_backward(Tensor grad_out, Tensor qkv, Tensor? bias_table, Tensor? qkv_bias, "
    f"Tensor? seed, Tensor lse, bool needs_table, {_PROBLEM}) -> (Tensor, Tensor)",
    _backward,
    _backward_outputs,
    _backward_flops,
)
