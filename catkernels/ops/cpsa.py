"""CPSA as PyTorch operators, one forward and one backward, and the Function that joins them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from catkernels.ops.device import KERNEL_DEVICES, device_reasons, interpreting

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_PATCH_SIZE = 8

_library = torch.library.Library("catkernels", "FRAGMENT")
_library.define(
    "cpsa_forward(Tensor x, Tensor folded, Tensor? bias, Tensor? seed, int patch_size, "
    "float dropout_p, ScalarType dtype) -> Tensor"
)
_library.define(
    "cpsa_backward(Tensor grad, Tensor x, Tensor folded, Tensor? seed, int patch_size, "
    "float dropout_p, bool gives_x, bool gives_weights) -> (Tensor, Tensor, Tensor)"
)


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
    reasons = device_reasons(device)
    if dtype not in DTYPES:
        reasons.append(f"the kernels compute in float16, bfloat16 or float32, not {dtype}")
    if not 1 <= patch_size <= MAX_PATCH_SIZE:
        reasons.append(f"patch_size is {patch_size}, the kernels serve 1 to {MAX_PATCH_SIZE}")
    exact = torch.backends.cuda.matmul.fp32_precision != "tf32"
    if needs_grad and dtype == torch.float32 and num_patches > 1 and exact and not interpreting():
        reasons.append(
            f"the backward pass of {num_patches} patches in float32 needs TF32 products: exact ones"
            " do not fit in registers (torch.backends.cuda.matmul.fp32_precision is not 'tf32')"
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

    Args:
        x: map (B, H, W, C) with any strides; in float32 it is rounded to ``dtype`` as it is read.
        dtype: what the kernels compute with and return.
    """
    with torch.autocast(x.device.type, enabled=False):
        folded = fold(qkv_weight, qkv_bias, proj_weight, scale)
        bias = None if proj_bias is None else proj_bias.float()
    seed = None
    if dropout_p > 0:
        seed = torch.randint(2**63 - 1, (1,), device=x.device)
    return _CPSA.apply(x, folded, bias, seed, patch_size, dropout_p, dtype)


def fold(qkv_weight: Tensor, qkv_bias: Tensor | None, proj_weight: Tensor, scale: float) -> Tensor:
    """The weights of queries and keys, and of values and outputs, multiplied, in float32.

    With rows of tokens x, the scores are ``scale (x Wq^T + bq) (x Wk^T + bk)^T`` up to what is the
    same for all keys, which the softmax ignores: ``(x A + u) x^T`` with ``A = scale Wq^T Wk`` and
    ``u = scale bq Wk``. Values and outputs together are ``x M + Wp bv + bp`` with
    ``M = (Wp Wv)^T``, since attention weights sum to 1. Keys and values are then the tokens.

    Args:
        qkv_weight: (3 N*N, N*N).
        qkv_bias: (3 N*N,) or None.
        proj_weight: (N*N, N*N).

    Returns:
        (2, N*N + 1, N*N): A with u as its last row, and M with Wp bv as its last row.
    """
    query, key, value = qkv_weight.float().chunk(3)
    if qkv_bias is None:
        query_bias = value_bias = query.new_zeros(len(query))
    else:
        query_bias, _, value_bias = qkv_bias.float().chunk(3)
    queries = torch.cat([query, query_bias[:, None]], 1)  # (N*N, N*N + 1)
    values = torch.cat([value, value_bias[:, None]], 1)
    return torch.stack([(scale * queries).mT @ key, values.mT @ proj_weight.float().mT])


class _CPSA(torch.autograd.Function):
    @staticmethod
    def forward(x, folded, bias, seed, patch_size, dropout_p, dtype):
        return torch.ops.catkernels.cpsa_forward(
            x, folded, bias, seed, patch_size, dropout_p, dtype
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, folded, _, seed, ctx.patch_size, ctx.dropout_p, _ = inputs
        ctx.save_for_backward(x, folded, seed)

    @staticmethod
    def backward(ctx, grad):
        x, folded, seed = ctx.saved_tensors
        gives_x, gives_folded, gives_bias = ctx.needs_input_grad[:3]
        gives_weights = gives_folded or gives_bias
        x_grad, folded_grad, bias_grad = _CPSABackward.apply(
            grad, x, folded, seed, ctx.patch_size, ctx.dropout_p, gives_x, gives_weights
        )
        return (
            x_grad if gives_x else None,
            folded_grad if gives_folded else None,
            bias_grad if gives_bias else None,
            None,
            None,
            None,
            None,
        )


class _CPSABackward(torch.autograd.Function):
    """A Function of its own, so that a second derivative meets an error instead of silence."""

    @staticmethod
    def forward(grad, x, folded, seed, patch_size, dropout_p, gives_x, gives_weights):
        return torch.ops.catkernels.cpsa_backward(
            grad, x, folded, seed, patch_size, dropout_p, gives_x, gives_weights
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            'cpsa_attention\'s kernels have no second derivative: use backend="reference"'
        )


def _forward(x, folded, bias, seed, patch_size, dropout_p, dtype):
    from catkernels.kernels.cpsa_forward import forward

    return forward(x, folded, bias, seed, patch_size, dropout_p, dtype)


def _backward(grad, x, folded, seed, patch_size, dropout_p, gives_x, gives_weights):
    from catkernels.kernels.cpsa_backward import backward

    return backward(grad, x, folded, seed, patch_size, dropout_p, gives_x, gives_weights)


for _device in KERNEL_DEVICES + (("cpu",) if interpreting() else ()):
    _library.impl("cpsa_forward", _forward, _device.upper())
    _library.impl("cpsa_backward", _backward, _device.upper())


@torch.library.register_fake("catkernels::cpsa_forward")
def _forward_fake(x, folded, bias, seed, patch_size, dropout_p, dtype):
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.register_fake("catkernels::cpsa_backward")
def _backward_fake(grad, x, folded, seed, patch_size, dropout_p, gives_x, gives_weights):
    side = folded.shape[2]
    return (
        x.new_empty(x.shape if gives_x else (0,)),
        folded.new_empty(folded.shape if gives_weights else (0,)),
        folded.new_empty((side,) if gives_weights else (0,)),
    )


def _products(x_shape: torch.Size, patch_size: int) -> tuple[int, int, int]:
    """Patches, and FLOPs of a product of all tokens with a matrix, and with one another."""
    batch, height, width, channels = x_shape
    patches = -(-height // patch_size) * -(-width // patch_size)
    by_matrix = 2 * batch * channels * patches * patch_size**4
    by_tokens = 2 * batch * channels * patches**2 * patch_size**2
    return patches, by_matrix, by_tokens


@register_flop_formula(torch.ops.catkernels.cpsa_forward)
def _forward_flops(x_shape, folded, bias, seed, patch_size, *args, out_shape=None, **kwargs) -> int:
    patches, by_matrix, by_tokens = _products(x_shape, patch_size)
    return by_matrix if patches == 1 else 2 * by_matrix + 2 * by_tokens


@register_flop_formula(torch.ops.catkernels.cpsa_backward)
def _backward_flops(
    grad_shape, x_shape, folded, seed, patch_size, *args, out_shape=None, **kwargs
) -> int:
    patches, by_matrix, by_tokens = _products(x_shape, patch_size)
    return 2 * by_matrix if patches == 1 else 5 * by_matrix + 6 * by_tokens
