"""Which kernels serve what a block has beside the core of its attention, and why none does.

| part | what kernels do | where |
|---|---|---|
| MLP | norm, both layers, GELU, residual: `ops.mlp.fused_mlp` | half precision, C <= 192 |
| MLP | GELU and its backward pass with fc1's bias, `split_mlp` | training, not compiled |
| norms | the backward pass with the residual's gradient, `ops.norm` | training, not compiled |
| norms | the cast to half precision | autocast |
| CPSA | its norm and its residual: `ops.cpsa_residual` | inference, half precision, P <= 16 |
| IPSA's qkv | norm and layer: `ops.linear.norm_linear_residual` | half precision, C <= 192 |
| IPSA's proj | layer, residual: `ops.linear.linear_residual` | half precision, C <= 192 |
| residuals | DropPath's factor and the sum, `ops.linear` | where norms or MLP are served |

From 384 channels on, what binds is the rate of products, at which PyTorch's are as fast as any of
ours. Whatever is not as the official code has it, or is listened to, goes its own way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from catkernels.arguments import Backend
from catkernels.layers import DropPath
from catkernels.ops import cpsa_residual, ipsa, linear
from catkernels.ops import mlp as mlps
from catkernels.ops import norm as norms
from catkernels.ops.operator import needs_grad
from catkernels.parts import AttentionParts, MlpParts, is_plain_linear
from catkernels.torch_state import hooks, transforms
from catkernels.torch_state.device import device_reasons
from catkernels.torch_state.precision import autocast_is_on, compute_dtype
from catkernels.torch_state.tensors import is_wrapper


def call_reasons(x: Tensor, backend: Backend) -> list[str]:
    """Why no kernel serves any part of a block, whatever it consists of."""
    reasons = []
    if backend == "reference":
        reasons.append("asked for the reference")
    if backend == "auto" and x.device.type == "cpu":
        reasons.append("on a CPU the kernels are only interpreted")
    else:
        reasons += device_reasons(x.device)
    if hooks.has_global_hooks():
        reasons.append("a hook listens to all modules")
    if transforms.is_tracing():
        reasons.append("traced: a trace has PyTorch's own operations")
    if transforms.is_transformed():
        reasons.append("function transforms: a block's own operations are PyTorch's there")
    if x.dtype not in (torch.float32, compute_dtype(x)):
        reasons.append(f"x is {x.dtype}, the linear layers compute in {compute_dtype(x)}")
    return reasons


def norm_reasons(norm: nn.Module, x: Tensor) -> list[str]:
    """Why no kernel serves a norm of ``x`` and the residual around it."""
    return _plain_norm_reasons(norm, x) or _moment_reasons(norm, x)


def _moment_reasons(norm: nn.Module, x: Tensor) -> list[str]:
    """Why no kernel serves even a plain norm in such a call."""
    reasons = []
    if torch.compiler.is_compiling():
        reasons.append("compiled: a compiler joins a norm with what stands beside it by itself")
    elif not (_trains(norm, x) or autocast_is_on(x.device)):
        reasons.append("in inference PyTorch's norm takes one pass as well")
    return reasons


def qkv_joins(norm: nn.Module, qkv: nn.Linear, x: Tensor) -> bool:
    """Whether kernels compute ``qkv(norm(x))``, as one, or the norm and its gradients for it."""
    if _plain_norm_reasons(norm, x):
        return False
    return not (_joined_reasons("qkv", qkv, x, channels=1) and _moment_reasons(norm, x))


def qkv_reasons(norm: nn.Module, qkv: nn.Linear, x: Tensor) -> list[str]:
    """Why ``qkv(norm(x))`` is no single kernel; ``qkv`` is a plain layer."""
    return _plain_norm_reasons(norm, x) + _joined_reasons("qkv", qkv, x, channels=1)


def proj_reasons(
    proj: nn.Linear, attn: AttentionParts, drop_path: nn.Module, x: Tensor
) -> list[str]:
    """Why ``x + drop_path(proj(attended))`` is no single kernel; ``proj`` is a plain layer."""
    reasons = drop_path_reasons(drop_path)
    if attn.drops_output:
        reasons.append("the attention drops output values in training")
    if proj.in_features != attn.num_heads * attn.head_dim:
        reasons.append("proj takes other channels than the attention gives")
    return reasons + _joined_reasons("proj", proj, x, channels=0)


def cpsa_joined_reasons(
    norm: nn.Module,
    attn: AttentionParts | None,
    drop_path: nn.Module,
    x: Tensor,
    *,
    patch_size: int,
    num_patches: int,
) -> list[str]:
    """Why ``x + drop_path(attn(norm(x)))`` of a CPSA is not CPSA's kernel with the norm in it.

    Args:
        attn: None where its call may do more than its parts.
        num_patches: P, of the padded map.
    """
    if attn is None:
        return ["the attention is called itself"]
    if attn.plain_layers is None:
        return ["qkv or proj is no plain nn.Linear, or carries hooks or parametrisations"]
    qkv, proj = attn.plain_layers
    parameters = _parameters(qkv) + _parameters(proj)
    reasons = cpsa_residual.joined_reasons(
        products=compute_dtype(x),
        parameters={parameter.dtype for parameter in parameters},
        channels=x.shape[-1],
        patch_size=patch_size,
        num_patches=num_patches,
    )
    if _trains(norm, x) or qkv.training or needs_grad(*parameters):
        reasons.append("CPSA joins its norm in inference alone: what that gives is to be kept")
    if reasons:
        # this is a part of every call
        return reasons
    pixels = patch_size**2
    if qkv.weight.shape != (3 * pixels, pixels) or proj.weight.shape != (pixels, pixels):
        reasons.append("qkv or proj is a layer of other patches")
    if any(parameter.device != x.device for parameter in parameters):
        reasons.append("qkv or proj is on another device")
    if attn.dropout_p or attn.drops_output:
        reasons.append("the attention drops values")
    reasons += _parameter_reasons(parameters, x)
    return reasons + _plain_norm_reasons(norm, x) + drop_path_reasons(drop_path)


def mlp_together(
    norm: nn.Module, mlp: MlpParts, drop_path: nn.Module, x: Tensor
) -> Callable[..., Tensor] | None:
    """What computes ``x + drop_path(mlp(norm(x)))`` by kernels, or None."""
    # nothing is asked twice: this is a part of every call
    if _joined_mlp_reasons(norm, mlp, drop_path, x):
        return None
    if not _fused_mlp_reasons(mlp, x):
        return mlps.fused_mlp
    return None if _split_mlp_reasons(norm, x) else mlps.split_mlp


def _joined_mlp_reasons(
    norm: nn.Module, mlp: MlpParts | None, drop_path: nn.Module, x: Tensor
) -> list[str]:
    """Why ``x + drop_path(mlp(norm(x)))`` is not just what kernels compute."""
    return _plain_norm_reasons(norm, x) + _plain_mlp_reasons(mlp, x) + drop_path_reasons(drop_path)


def _fused_mlp_reasons(mlp: MlpParts | None, x: Tensor) -> list[str]:
    """Why not all of it is one kernel."""
    if mlp is None:
        return []
    return mlps.fused_reasons(products=compute_dtype(x), shape=mlp.fc1.weight.shape)


def _split_mlp_reasons(norm: nn.Module, x: Tensor) -> list[str]:
    """Why no kernels join what stands between the MLP's products."""
    reasons = _moment_reasons(norm, x)
    if not (reasons or _trains(norm, x)):
        reasons.append("in inference PyTorch's operations take no more passes")
    return reasons


def residual_reasons(drop_path: nn.Module) -> list[str]:
    """Why a branch's factor and its sum with the input are no one pass."""
    reasons = drop_path_reasons(drop_path)
    if torch.compiler.is_compiling():
        reasons.append("compiled: a compiler joins them by itself")
    return reasons


def unserved_parts(
    x: Tensor,
    backend: Backend,
    *,
    norm1: nn.Module,
    norm2: nn.Module,
    attn: AttentionParts | None,
    mlp: MlpParts | None,
    drop_path: nn.Module,
    attn_type: str,
    patch_size: int,
    num_patches: int,
) -> dict[str, list[str]]:
    """Why kernels do not serve the parts of a block; no reason where they do.

    Args:
        attn, mlp: None where their calls may do more than their parts.
        attn_type: "ipsa" or "cpsa", whose ``qkv`` and ``proj`` are parts of its kernels.
    """
    parts = ["norms", "MLP", "projections"] if attn_type == "ipsa" else ["norms", "MLP"]
    if whole := call_reasons(x, backend):
        return dict.fromkeys(parts, whole)
    of_norm1, of_norm2 = norm_reasons(norm1, x), norm_reasons(norm2, x)
    of_projections: list[str] = []
    if attn_type == "ipsa":
        of_qkv, of_proj = _projection_reasons(norm1, attn, patch_size, drop_path, x)
        of_projections = [*of_qkv, *of_proj]
        # what computes qkv norms as well, and so does what computes an MLP
        of_norm1 = of_norm1 if of_qkv else []
    elif of_norm1:
        sizes = {"patch_size": patch_size, "num_patches": num_patches}
        of_joined = cpsa_joined_reasons(norm1, attn, drop_path, x, **sizes)
        of_norm1 = [*of_norm1, *of_joined] if of_joined else []
    of_mlp = _joined_mlp_reasons(norm2, mlp, drop_path, x)
    if not of_mlp:
        fused, split = _fused_mlp_reasons(mlp, x), _split_mlp_reasons(norm2, x)
        of_mlp = [*fused, *split] if fused and split else []
    of_norm2 = of_norm2 if of_mlp else []
    reasons = ([*of_norm1, *of_norm2], of_mlp, of_projections)
    return {part: list(dict.fromkeys(why)) for part, why in zip(parts, reasons, strict=False)}


def drop_path_reasons(drop_path: nn.Module) -> list[str]:
    """Why it is not known what factor ``drop_path`` multiplies an image's branch with."""
    if type(drop_path) in (nn.Identity, DropPath) or _is_timm(drop_path):
        return _interception_reasons({"drop_path": drop_path})
    return [f"drop_path is a {type(drop_path).__name__}, which may drop in another way"]


def drop_factor(drop_path: nn.Module, branch_dtype: torch.dtype, x: Tensor) -> Tensor | None:
    """What a known ``drop_path`` multiplies each image's branch with, (B,); None where nothing.

    It draws what it would draw for the branch itself.
    """
    if type(drop_path) is nn.Identity or not (drop_path.training and drop_path.drop_prob):
        return None
    ones = torch.ones((x.shape[0], 1, 1), dtype=branch_dtype, device=x.device)
    return drop_path(ones).view(-1)


def _plain_norm_reasons(norm: nn.Module, x: Tensor) -> list[str]:
    """Why a norm is not just what kernels compute, and ``x`` what they take."""
    if type(norm) is not nn.LayerNorm:
        return [f"the norm is a {type(norm).__name__}, not an nn.LayerNorm"]
    reasons = _interception_reasons({"the norm": norm})
    if norm.normalized_shape != x.shape[-1:]:
        reasons.append(f"the norm is over {norm.normalized_shape}, not over the channels")
    if norm.weight is None:
        reasons.append("the norm has no weights")
    parameters = _parameters(norm)
    reasons += _parameter_reasons(parameters, x)
    dtypes = {x.dtype, compute_dtype(x), *(p.dtype for p in parameters)}
    return reasons + norms.unsupported_reasons(device=x.device, dtypes=dtypes, channels=x.shape[-1])


def _joined_reasons(name: str, layer: nn.Linear, x: Tensor, *, channels: int) -> list[str]:
    """Why no kernel joins a layer with a norm or residual of ``x``.

    Args:
        channels: the axis of the layer's weight that is those of ``x``.
    """
    size = layer.weight.shape
    if size[channels] != x.shape[-1]:
        return [f"{name} is a layer of other channels than x has"]
    return _parameter_reasons(_parameters(layer), x) + linear.joined_reasons(
        products=compute_dtype(x), channels=size[channels], features=size[1 - channels]
    )


def _projection_reasons(
    norm: nn.Module, attn: AttentionParts | None, window: int, drop_path: nn.Module, x: Tensor
) -> tuple[list[str], list[str]]:
    """`qkv_reasons` and `proj_reasons` of an IPSA, or why its layers are called and not read."""
    if attn is None:
        called = ["the attention is called itself"]
    elif attn.plain_layers is None:
        called = ["qkv or proj is no plain nn.Linear, or carries hooks or parametrisations"]
    else:
        reasons = ipsa.unsupported_reasons(
            device=x.device,
            dtype=compute_dtype(x),
            head_dim=attn.head_dim,
            patch_size=window,
            needs_grad=needs_grad(x),
        )
        if not reasons:
            qkv, proj = attn.plain_layers
            return qkv_reasons(norm, qkv, x), proj_reasons(proj, attn, drop_path, x)
        called = ["the attention is left to the reference"]
    return called, called


def _plain_mlp_reasons(mlp: MlpParts | None, x: Tensor) -> list[str]:
    """Why an MLP is not just what kernels compute."""
    if mlp is None:
        return ["the MLP is intercepted, or of a class whose call may do more than its parts"]
    if not (is_plain_linear(mlp.fc1) and is_plain_linear(mlp.fc2)):
        return ["fc1 or fc2 is no plain nn.Linear, or carries hooks or parametrisations"]
    reasons = []
    shape = mlp.fc1.weight.shape
    if shape != mlp.fc2.weight.shape[::-1] or shape[1] != x.shape[-1]:
        reasons.append("fc1 and fc2 are layers of other channels than x has")
    if type(mlp.act) is not nn.GELU or mlp.act.approximate != "none":
        reasons.append(f"the activation is {mlp.act}, not the exact GELU")
    if any(type(drop) not in (nn.Dropout, nn.Identity) for drop in mlp.drops):
        reasons.append("the MLP's dropout is none of PyTorch's")
    if mlp.drops_values:
        reasons.append("the MLP drops values in training")
    first, second = mlp.drops
    reasons += _interception_reasons({"act": mlp.act, "drop": first, "the last drop": second})
    return reasons + _parameter_reasons(_parameters(mlp.fc1) + _parameters(mlp.fc2), x)


def _trains(norm: nn.Module, x: Tensor) -> bool:
    """Whether there is a backward pass, or will be one.

    What is checkpointed is computed without gradients first, and then with them, to the same bits.
    """
    return norm.training or needs_grad(x, *_parameters(norm))


def _interception_reasons(modules: dict[str, nn.Module]) -> list[str]:
    return [
        f"{name} carries hooks or a forward of its own"
        for name, module in modules.items()
        if hooks.is_intercepted(module)
    ]


def _parameters(layer: Any) -> list[Tensor]:
    """Weight and bias of a norm or linear layer, by name: `parameters()` takes 10 us."""
    return [tensor for tensor in (layer.weight, layer.bias) if tensor is not None]


def _parameter_reasons(parameters: list[Tensor], x: Tensor) -> list[str]:
    if any(is_wrapper(parameter) for parameter in parameters):
        return ["parameters are wrappers around other tensors"]
    if any(p.dtype != x.dtype for p in parameters) and not autocast_is_on(x.device):
        return ["parameters have another dtype than x, outside of autocast"]
    return []


def _is_timm(drop_path: nn.Module) -> bool:
    """Whether it is timm's, which the official code takes; where timm is not, there is none."""
    cls = type(drop_path)
    return cls.__name__ == "DropPath" and cls.__module__.startswith("timm.")
