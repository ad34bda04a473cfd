"""Both attentions as functions, each by the backend that serves the call.

``backend="triton"`` runs the kernels or raises with every reason why it cannot.
``backend="reference"`` runs `catkernels.reference`, or on a CPU without gradients `catkernels.cpu`,
which computes the same in slices of the batch. ``backend="auto"`` runs the kernels where they
can serve and the reference elsewhere; `unsupported_reasons` says why a call would not reach them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, overload

from torch import Tensor

from catkernels import choice, cpu, reference
from catkernels.arguments import Backend, check_patch_size
from catkernels.ops import cpsa, ipsa
from catkernels.torch_state import transforms
from catkernels.torch_state.precision import compute_dtype


@overload
def ipsa_attention(
    qkv: Tensor,
    bias_table: Tensor | None,
    *,
    num_heads: int,
    patch_size: int | tuple[int, int],
    scale: float | None = ...,
    qkv_bias: Tensor | None = ...,
    dropout_p: float = ...,
    return_attention: Literal[False] = ...,
    backend: Backend = ...,
) -> Tensor: ...


@overload
def ipsa_attention(
    qkv: Tensor,
    bias_table: Tensor | None,
    *,
    num_heads: int,
    patch_size: int | tuple[int, int],
    scale: float | None = ...,
    qkv_bias: Tensor | None = ...,
    dropout_p: float = ...,
    return_attention: Literal[True],
    backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def ipsa_attention(
    qkv: Tensor,
    bias_table: Tensor | None,
    *,
    num_heads: int,
    patch_size: int | tuple[int, int],
    scale: float | None = ...,
    qkv_bias: Tensor | None = ...,
    dropout_p: float = ...,
    return_attention: bool,
    backend: Backend = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def ipsa_attention(
    qkv: Tensor,
    bias_table: Tensor | None,
    *,
    num_heads: int,
    patch_size: int | tuple[int, int],
    scale: float | None = None,
    qkv_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    return_attention: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Inner-patch self-attention: ``softmax(scale q k^T + bias) v`` among each window's pixels.

    The windows are N x N and do not overlap (paper, section 3.1). Where N does not divide H or W,
    the map is padded at the bottom and right with pixels whose q, k, v are ``qkv_bias``. They are
    ordinary tokens, not masked, as in the official code for dense tasks.

    Args:
        qkv: queries, keys and values (B, H, W, 3C), the last axis laid out (3, heads, C / heads);
            any floating dtype and strides. Autocast casts it as it does `torch.nn.Linear`'s input.
            It is what a linear layer makes of a map (B, H, W, C). The map itself cannot be told
            from it where ``3 * num_heads`` divides C, and would come back with C / 3 channels.
        bias_table: relative position bias ((2N - 1)**2, heads) of any floating dtype; its row is
            ``(dy + N-1) (2N-1) + (dx + N-1)``. None, which must be said: no bias.
        num_heads: number of heads; divides C.
        patch_size: N, or (N, N).
        scale: factor on ``q k^T``. None: ``(C / heads)**-0.5``.
        qkv_bias: q, k, v (3C,) of padded pixels. None: zeros.
        dropout_p: probability of dropping an attention weight, in [0, 1). The caller says when it
            trains: pass 0 in evaluation.
        return_attention: also return the attention weights, before dropout (reference only).
        backend: "auto", "triton" or "reference".

    Returns:
        The map (B, H, W, C) in the dtype of ``qkv`` (under autocast, autocast's). With
        ``return_attention`` also the weights (B, windows, heads, N*N, N*N).

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: an argument has the wrong shape, device or value, or ``backend="triton"``
            cannot serve the call.
    """
    qkv = transforms.known_to_need_grad(qkv)
    bias_table = transforms.known_to_need_grad(bias_table)
    qkv_bias = transforms.known_to_need_grad(qkv_bias)
    reasons = choice.ipsa_reasons(
        qkv,
        bias_table,
        num_heads=num_heads,
        patch_size=patch_size,
        scale=scale,
        qkv_bias=qkv_bias,
        dropout_p=dropout_p,
        return_attention=return_attention,
        backend=backend,
    )
    side = check_patch_size(patch_size)
    # as autocast does for scaled_dot_product_attention: what arrives in float32 leaves in half
    qkv = qkv.to(compute_dtype(qkv))
    if choice.choose_kernels("ipsa_attention", backend, qkv.device, reasons):
        return ipsa.ipsa_attention(
            qkv,
            bias_table,
            qkv_bias,
            num_heads=num_heads,
            patch_size=side,
            scale=(qkv.shape[-1] // 3 // num_heads) ** -0.5 if scale is None else scale,
            dropout_p=dropout_p,
        )
    if cpu.serves(
        qkv, bias_table, qkv_bias, dropout_p=dropout_p, return_attention=return_attention
    ):
        return cpu.ipsa_attention(
            qkv,
            bias_table,
            num_heads=num_heads,
            patch_size=side,
            scale=scale,
            qkv_bias=qkv_bias,
        )
    return reference.ipsa_attention(
        qkv,
        bias_table,
        num_heads=num_heads,
        patch_size=side,
        scale=scale,
        qkv_bias=qkv_bias,
        dropout_p=dropout_p,
        return_attention=return_attention,
    )


@overload
def cpsa_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    patch_size: int | tuple[int, int],
    scale: float | None = ...,
    dropout_p: float = ...,
    return_attention: Literal[False] = ...,
    backend: Backend = ...,
) -> Tensor: ...


@overload
def cpsa_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    patch_size: int | tuple[int, int],
    scale: float | None = ...,
    dropout_p: float = ...,
    return_attention: Literal[True],
    backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def cpsa_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    patch_size: int | tuple[int, int],
    scale: float | None = ...,
    dropout_p: float = ...,
    return_attention: bool,
    backend: Backend = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def cpsa_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    patch_size: int | tuple[int, int],
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_attention: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-patch self-attention among the P patches of each single-channel map.

    A patch is one token: its N*N pixels, row-major (paper, section 3.2). For every image and
    channel, ``proj(softmax(scale q k^T) v)`` with ``q, k, v = split(qkv(patches))``; one head, and
    all channels share the weights. Where N does not divide H or W, the map is padded with zeros at
    the bottom and right, without a mask, as in the official code for dense tasks.

    Args:
        x: map (B, H, W, C), any floating dtype and strides.
        qkv_weight: (3 N*N, N*N), in the dtype of ``x`` (under autocast: any).
        qkv_bias: (3 N*N,) or None.
        proj_weight: (N*N, N*N).
        proj_bias: (N*N,) or None.
        patch_size: N, or (N, N).
        scale: factor on ``q k^T``. None: ``(N*N)**-0.5``.
        dropout_p: probability of dropping an attention weight, in [0, 1). The caller says when it
            trains: pass 0 in evaluation.
        return_attention: also return the attention weights, before dropout (reference only).
        backend: "auto", "triton" or "reference".

    Returns:
        The map (B, H, W, C) in the dtype of ``x`` (under autocast, autocast's). With
        ``return_attention`` also the weights (B, C, P, P).

    Raises:
        TypeError: an argument is not a floating-point tensor, or their dtypes differ.
        ValueError: an argument has the wrong shape, device or value, or ``backend="triton"``
            cannot serve the call.
    """
    x = transforms.known_to_need_grad(x)
    qkv_weight = transforms.known_to_need_grad(qkv_weight)
    qkv_bias = transforms.known_to_need_grad(qkv_bias)
    proj_weight = transforms.known_to_need_grad(proj_weight)
    proj_bias = transforms.known_to_need_grad(proj_bias)
    tensors = (x, qkv_weight, qkv_bias, proj_weight, proj_bias)
    reasons = choice.cpsa_reasons(
        *tensors,
        patch_size=patch_size,
        scale=scale,
        dropout_p=dropout_p,
        return_attention=return_attention,
        backend=backend,
    )
    side = check_patch_size(patch_size)
    if choice.choose_kernels("cpsa_attention", backend, x.device, reasons):
        return cpsa.cpsa_attention(
            *tensors,
            patch_size=side,
            scale=1 / side if scale is None else scale,
            dropout_p=dropout_p,
            dtype=compute_dtype(x),
        )
    if cpu.serves(*tensors, dropout_p=dropout_p, return_attention=return_attention):
        return cpu.cpsa_attention(*tensors, patch_size=side, scale=scale)
    return reference.cpsa_attention(
        *tensors,
        patch_size=side,
        scale=scale,
        dropout_p=dropout_p,
        return_attention=return_attention,
    )


def unsupported_reasons(attention: Callable[..., Any], *args: Any, **kwargs: Any) -> list[str]:
    """Why the Triton kernels cannot serve the call ``attention(*args, **kwargs)``.

    Args:
        attention: `ipsa_attention` or `cpsa_attention`.
        args, kwargs: the arguments of the call.

    Returns:
        One sentence a reason; an empty list where the kernels can serve the call.

    Raises:
        TypeError, ValueError: what the call itself would raise of its arguments.
    """
    if attention not in (ipsa_attention, cpsa_attention):
        raise ValueError(f"attention must be ipsa_attention or cpsa_attention, got {attention!r}")
    call = inspect.signature(attention).bind(*args, **kwargs)
    call.apply_defaults()
    reasons = choice.ipsa_reasons if attention is ipsa_attention else choice.cpsa_reasons
    return reasons(**call.arguments)
