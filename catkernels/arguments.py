"""What the attentions take, checked: every error names the argument, what it got, what it needs."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor

from catkernels.torch_state.precision import autocast_is_on

Backend = Literal["auto", "triton", "reference"]
BACKENDS: tuple[Backend, ...] = ("auto", "triton", "reference")


def check_backend(backend: str) -> Backend:
    """``backend`` itself, where it is one."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def check_patch_size(patch_size: int | tuple[int, int]) -> int:
    """N from an N or an (N, N)."""
    sides = tuple(patch_size) if isinstance(patch_size, Sequence) else (patch_size, patch_size)
    whole = all(isinstance(side, Integral) for side in sides)
    if not whole or len(sides) != 2 or sides[0] != sides[1] or sides[0] < 1:
        raise ValueError(f"patch_size must be N or (N, N) with an integer N >= 1, got {patch_size}")
    return int(sides[0])


def check_probability(name: str, probability: float) -> float:
    """``probability`` itself, where something may be dropped with it."""
    if not 0 <= probability < 1:
        raise ValueError(f"{name} must be in [0, 1), got {probability}")
    return probability


def check_ipsa(
    qkv: Tensor,
    bias_table: Tensor | None,
    *,
    num_heads: int,
    patch_size: int,
    scale: float | None,
    qkv_bias: Tensor | None,
    dropout_p: float,
) -> None:
    """Raise unless `catkernels.ipsa_attention` can compute with these, by any backend."""
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


def check_cpsa(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    patch_size: int,
    scale: float | None,
    dropout_p: float,
) -> None:
    """Raise unless `catkernels.cpsa_attention` can compute with these, by any backend."""
    pixels = patch_size**2
    _check_tensor("x", x, "(B, H, W, C)", (None, None, None, None))
    _check_weight("qkv_weight", qkv_weight, "(3 N*N, N*N)", (3 * pixels, pixels), like=x)
    if qkv_bias is not None:
        _check_weight("qkv_bias", qkv_bias, "(3 N*N,)", (3 * pixels,), like=x)
    _check_weight("proj_weight", proj_weight, "(N*N, N*N)", (pixels, pixels), like=x)
    if proj_bias is not None:
        _check_weight("proj_bias", proj_bias, "(N*N,)", (pixels,), like=x)
    _check_scale_and_dropout(scale, dropout_p)


def _check_weight(name: str, weight: Tensor, axes: str, sizes: Sequence[int], like: Tensor) -> None:
    """Raise unless ``weight`` has these sizes, and the device and, but for autocast, the dtype."""
    _check_tensor(name, weight, axes, sizes, like=like)
    if weight.dtype != like.dtype and (
        torch.float64 in (weight.dtype, like.dtype) or not autocast_is_on(like.device)
    ):
        raise TypeError(
            f"{name} is {weight.dtype} but x is {like.dtype}: give them one dtype or use autocast"
        )


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
