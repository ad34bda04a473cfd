"""Which backend serves a call of an attention: the reasons against the kernels, and the choice."""

from __future__ import annotations

import torch
from torch import Tensor

from catkernels import reference
from catkernels.arguments import Backend, check_backend, check_cpsa, check_ipsa, check_patch_size
from catkernels.ops import cpsa, ipsa
from catkernels.torch_state import transforms
from catkernels.torch_state.precision import compute_dtype


def choose_kernels(
    function: str, backend: Backend, device: torch.device, reasons: list[str]
) -> bool:
    """Whether the kernels serve a call; on a CPU they only do on request, since it interprets.

    Raises:
        ValueError: there is no such backend, or reasons against the one that was asked for.
    """
    if check_backend(backend) == "triton" and reasons:
        raise ValueError(
            f"{function} cannot use backend='triton': {'; '.join(reasons)}. "
            "Use backend='auto' or 'reference'."
        )
    return backend == "triton" or (backend == "auto" and device.type != "cpu" and not reasons)


def ipsa_runs_kernels(x: Tensor, *, head_dim: int, patch_size: int, backend: Backend) -> bool:
    """Whether `ipsa_attention` of a projection of the map ``x`` (B, H, W, C) would run kernels.

    Raises:
        ValueError: ``backend="triton"`` cannot serve the call.
    """
    reasons = _ipsa_kernel_reasons(x, head_dim, patch_size, torch.is_grad_enabled())
    return choose_kernels("ipsa_attention", backend, x.device, reasons)


def ipsa_reasons(
    qkv: Tensor,
    bias_table: Tensor | None,
    *,
    num_heads: int,
    patch_size: int | tuple[int, int],
    scale: float | None,
    qkv_bias: Tensor | None,
    dropout_p: float,
    return_attention: bool,
    backend: Backend,
) -> list[str]:
    """Why the kernels cannot serve a call; what no backend could serve is raised."""
    check_backend(backend)
    side = check_patch_size(patch_size)
    check_ipsa(
        qkv,
        bias_table,
        num_heads=num_heads,
        patch_size=side,
        scale=scale,
        qkv_bias=qkv_bias,
        dropout_p=dropout_p,
    )
    head_dim = qkv.shape[-1] // 3 // num_heads
    reasons = _ipsa_kernel_reasons(qkv, head_dim, side, _needs_grad(qkv, bias_table, qkv_bias))
    return reasons + _attention_map_reasons(return_attention)


def _ipsa_kernel_reasons(x: Tensor, head_dim: int, patch_size: int, needs_grad: bool) -> list[str]:
    """Why the kernels cannot serve IPSA of a map with the device and dtype of ``x``."""
    reasons = ipsa.unsupported_reasons(
        device=x.device, dtype=compute_dtype(x), head_dim=head_dim, patch_size=patch_size
    )
    return reasons + transforms.transform_reasons(needs_grad)


def cpsa_reasons(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    patch_size: int | tuple[int, int],
    scale: float | None,
    dropout_p: float,
    return_attention: bool,
    backend: Backend,
) -> list[str]:
    """Why the kernels cannot serve a call; what no backend could serve is raised."""
    check_backend(backend)
    side = check_patch_size(patch_size)
    tensors = (x, qkv_weight, qkv_bias, proj_weight, proj_bias)
    check_cpsa(*tensors, patch_size=side, scale=scale, dropout_p=dropout_p)
    needs_grad = _needs_grad(*tensors)
    reasons = cpsa.unsupported_reasons(
        device=x.device,
        dtype=compute_dtype(x),
        patch_size=side,
        num_patches=reference.num_patches(x.shape[1], x.shape[2], side),
        needs_grad=needs_grad,
    )
    return (
        reasons
        + transforms.transform_reasons(needs_grad)
        + _attention_map_reasons(return_attention)
    )


def _attention_map_reasons(return_attention: bool) -> list[str]:
    return ["return_attention: the kernels never write the weights"] if return_attention else []


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
