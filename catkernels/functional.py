"""Both attentions as functions: arguments are checked and the backend chosen here.

``backend="triton"`` runs the kernels or raises with every reason why it cannot.
``backend="reference"`` runs `catkernels.reference`, or on a CPU without gradients `catkernels.cpu`,
which computes the same in slices of the batch. ``backend="auto"`` runs the kernels where they
can serve and the reference elsewhere; `unsupported_reasons` says why a call would not reach them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor

from catkernels import cpu, reference
from catkernels.ops import cpsa, ipsa
from catkernels.torch_state import transforms
from catkernels.torch_state.precision import autocast_is_on, compute_dtype

Backend = Literal["auto", "triton", "reference"]
BACKENDS: tuple[Backend, ...] = ("auto", "triton", "reference")


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
    patch_size = check_patch_size(patch_size)
    _check_ipsa(
        qkv,
        bias_table,
        num_heads=num_heads,
        patch_size=patch_size,
        scale=scale,
        qkv_bias=qkv_bias,
        dropout_p=dropout_p,
    )
    qkv, bias_table, qkv_bias = transforms.known_to_need_grad(qkv, bias_table, qkv_bias)
    # as autocast does for scaled_dot_product_attention: what arrives in float32 leaves in half
    qkv = qkv.to(compute_dtype(qkv))
    reasons = _ipsa_reasons(
        qkv,
        bias_table,
        num_heads=num_heads,
        patch_size=patch_size,
        qkv_bias=qkv_bias,
        return_attention=return_attention,
    )
    if _runs_kernels("ipsa_attention", backend, qkv.device, reasons):
        return ipsa.ipsa_attention(
            qkv,
            bias_table,
            qkv_bias,
            num_heads=num_heads,
            patch_size=patch_size,
            scale=(qkv.shape[-1] // 3 // num_heads) ** -0.5 if scale is None else scale,
            dropout_p=dropout_p,
        )
    options = {
        "num_heads": num_heads,
        "patch_size": patch_size,
        "scale": scale,
        "qkv_bias": qkv_bias,
    }
    extras = {"dropout_p": dropout_p, "return_attention": return_attention}
    if cpu.serves(qkv, bias_table, qkv_bias, **extras):
        return cpu.ipsa_attention(qkv, bias_table, **options)
    return reference.ipsa_attention(qkv, bias_table, **options, **extras)


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
    patch_size = check_patch_size(patch_size)
    arguments = (x, qkv_weight, qkv_bias, proj_weight, proj_bias)
    _check_cpsa(*arguments, patch_size=patch_size, scale=scale, dropout_p=dropout_p)
    arguments = transforms.known_to_need_grad(*arguments)
    reasons = _cpsa_reasons(*arguments, patch_size=patch_size, return_attention=return_attention)
    if _runs_kernels("cpsa_attention", backend, x.device, reasons):
        return cpsa.cpsa_attention(
            *arguments,
            patch_size=patch_size,
            scale=1 / patch_size if scale is None else scale,
            dropout_p=dropout_p,
            dtype=compute_dtype(x),
        )
    options = {"patch_size": patch_size, "scale": scale}
    extras = {"dropout_p": dropout_p, "return_attention": return_attention}
    if cpu.serves(*arguments, **extras):
        return cpu.cpsa_attention(*arguments, **options)
    return reference.cpsa_attention(*arguments, **options, **extras)


def unsupported_reasons(attention: Callable, *args, **kwargs) -> list[str]:
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
    inspect.signature(attention).bind(*args, **kwargs)
    is_ipsa = attention is ipsa_attention
    check, explain = (_check_ipsa, _ipsa_reasons) if is_ipsa else (_check_cpsa, _cpsa_reasons)
    check(*args, **kwargs)
    return explain(*args, **kwargs)


def check_patch_size(patch_size: int | tuple[int, int]) -> int:
    """N from an N or an (N, N)."""
    sides = tuple(patch_size) if isinstance(patch_size, Sequence) else (patch_size, patch_size)
    whole = all(isinstance(side, Integral) for side in sides)
    if not whole or len(sides) != 2 or sides[0] != sides[1] or sides[0] < 1:
        raise ValueError(f"patch_size must be N or (N, N) with an integer N >= 1, got {patch_size}")
    return int(sides[0])


def check_backend(backend: str) -> Backend:
    """``backend`` itself, where it is one."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def ipsa_runs_kernels(x: Tensor, *, head_dim: int, patch_size: int, backend: Backend) -> bool:
    """Whether `ipsa_attention` of a projection of the map ``x`` (B, H, W, C) would run kernels.

    Raises:
        ValueError: ``backend="triton"`` cannot serve the call.
    """
    reasons = _ipsa_kernel_reasons(x, head_dim, patch_size, torch.is_grad_enabled())
    return _runs_kernels("ipsa_attention", backend, x.device, reasons)


def check_probability(name: str, probability: float) -> float:
    """``probability`` itself, where something may be dropped with it."""
    if not 0 <= probability < 1:
        raise ValueError(f"{name} must be in [0, 1), got {probability}")
    return probability


def _ipsa_reasons(
    qkv, bias_table, *, num_heads, patch_size, qkv_bias=None, return_attention=False, **_
) -> list[str]:
    head_dim = qkv.shape[-1] // 3 // num_heads
    needs_grad = _needs_grad(qkv, bias_table, qkv_bias)
    reasons = _ipsa_kernel_reasons(qkv, head_dim, check_patch_size(patch_size), needs_grad)
    return reasons + _attention_map_reasons(return_attention)


def _ipsa_kernel_reasons(x, head_dim: int, patch_size: int, needs_grad: bool) -> list[str]:
    """Why the kernels cannot serve IPSA of a map with the device and dtype of ``x``."""
    reasons = ipsa.unsupported_reasons(
        device=x.device, dtype=compute_dtype(x), head_dim=head_dim, patch_size=patch_size
    )
    return reasons + _transform_reasons(needs_grad)


def _cpsa_reasons(
    x,
    qkv_weight,
    qkv_bias,
    proj_weight,
    proj_bias,
    *,
    patch_size,
    return_attention=False,
    **_,
) -> list[str]:
    patch_size = check_patch_size(patch_size)
    needs_grad = _needs_grad(x, qkv_weight, qkv_bias, proj_weight, proj_bias)
    reasons = cpsa.unsupported_reasons(
        device=x.device,
        dtype=compute_dtype(x),
        patch_size=patch_size,
        num_patches=-(-x.shape[1] // patch_size) * -(-x.shape[2] // patch_size),
        needs_grad=needs_grad,
    )
    reasons += _transform_reasons(needs_grad)
    return reasons + _attention_map_reasons(return_attention)


def _transform_reasons(needs_grad: bool) -> list[str]:
    reasons = []
    if transforms.is_forward_mode():
        reasons.append("forward-mode differentiation: the kernels only have a backward pass")
    if needs_grad and transforms.is_vmap():
        reasons.append("gradients under torch.func.vmap: the kernels' have no batching rule")
    return reasons


def _attention_map_reasons(return_attention: bool) -> list[str]:
    return ["return_attention: the kernels never write the weights"] if return_attention else []


def _runs_kernels(
    function: str, backend: Backend, device: torch.device, reasons: list[str]
) -> bool:
    """Whether the kernels serve a call; on a CPU they only do on request, since it interprets."""
    if check_backend(backend) == "triton" and reasons:
        raise ValueError(
            f"{function} cannot use backend='triton': {'; '.join(reasons)}. "
            "Use backend='auto' or 'reference'."
        )
    return backend == "triton" or (backend == "auto" and device.type != "cpu" and not reasons)


def _check_ipsa(
    qkv,
    bias_table,
    *,
    num_heads,
    patch_size,
    scale=None,
    qkv_bias=None,
    dropout_p=0.0,
    **_,
) -> None:
    patch_size = check_patch_size(patch_size)
    _check_tensor("qkv", qkv, "(B, H, W, 3C)", (None, None, None, None))
    channels = qkv.shape[-1] // 3
    _check_number("num_heads", num_heads, int)
    if num_heads < 1 or channels < 1 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            "qkv must be (B, H, W, 3C), the queries, keys and values of a map of C channels, and C "
            f"a multiple of num_heads={num_heads}, got {qkv.shape[-1]} channels"
        )
    if bias_table is not None:
        sizes = ((2 * patch_size - 1) ** 2, num_heads)
        _check_tensor("bias_table", bias_table, "((2N - 1)**2, heads)", sizes, like=qkv)
    if qkv_bias is not None:
        axes = "(3C,) where qkv is (B, H, W, 3C)"
        _check_tensor("qkv_bias", qkv_bias, axes, (3 * channels,), like=qkv)
    _check_scale_and_dropout(scale, dropout_p)


def _check_cpsa(
    x, qkv_weight, qkv_bias, proj_weight, proj_bias, *, patch_size, scale=None, dropout_p=0.0, **_
) -> None:
    pixels = check_patch_size(patch_size) ** 2
    _check_tensor("x", x, "(B, H, W, C)", (None, None, None, None))
    weights = {
        "qkv_weight": (qkv_weight, "(3 N*N, N*N)", (3 * pixels, pixels)),
        "qkv_bias": (qkv_bias, "(3 N*N,)", (3 * pixels,)),
        "proj_weight": (proj_weight, "(N*N, N*N)", (pixels, pixels)),
        "proj_bias": (proj_bias, "(N*N,)", (pixels,)),
    }
    for name, (weight, axes, sizes) in weights.items():
        if weight is None and name.endswith("bias"):
            continue
        _check_tensor(name, weight, axes, sizes, like=x)
        if weight.dtype != x.dtype and (
            torch.float64 in (weight.dtype, x.dtype) or not autocast_is_on(x.device)
        ):
            raise TypeError(
                f"{name} is {weight.dtype} but x is {x.dtype}: give them one dtype or use autocast"
            )
    _check_scale_and_dropout(scale, dropout_p)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _check_tensor(
    name: str,
    tensor: Tensor,
    axes: str,
    sizes: Sequence[int | None],
    like: Tensor | None = None,
) -> None:
    """Raise unless ``tensor`` is floating, has these sizes (None: any) and is where ``like`` is."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor {axes}, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    wrong = len(tensor.shape) != len(sizes) or any(
        size is not None and actual != size
        for actual, size in zip(tensor.shape, sizes, strict=True)
    )
    if wrong:
        needed = "" if None in sizes else f" = {tuple(sizes)}"
        raise ValueError(f"{name} must be {axes}{needed}, got {tuple(tensor.shape)}")
    if like is not None and tensor.device != like.device:
        raise ValueError(
            f"{name} is on {tensor.device} but the map is on {like.device}: move both to one device"
        )


def _check_scale_and_dropout(scale: float | None, dropout_p: float) -> None:
    if scale is not None:
        _check_number("scale", scale, float)
    _check_number("dropout_p", dropout_p, float)
    check_probability("dropout_p", dropout_p)


def _check_number(name: str, value: float, kind: type) -> None:
    if not isinstance(value, (int, kind)):
        raise TypeError(f"{name} must be {kind.__name__}, got {type(value).__name__}")
