"""IPSA and CPSA as modules, with the official parameter names.

`ipsa_layer` and `cpsa_layer` work with the parts of any module of that structure, ours or the
official code's, so that an adopted block and a block of our own share one path.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from catkernels import cpu, reference
from catkernels.arguments import Backend, check_backend, check_patch_size, check_probability
from catkernels.functional import cpsa_attention, ipsa_attention, ipsa_runs_kernels
from catkernels.ops.norm_linear import norm_linear
from catkernels.parts import AttentionParts
from catkernels.torch_state.hooks import is_intercepted
from catkernels.torch_state.precision import autocast_is_on


class _Attention(nn.Module):
    """What IPSA and CPSA share: the official parameters, and tokens or a map as the input."""

    def __init__(
        self,
        dim: int,
        patch_size: int | tuple[int, int],
        num_heads: int,
        qkv_bias: bool,
        qk_scale: float | None,
        attn_drop: float,
        proj_drop: float,
        rpe: bool,
        backend: Backend,
    ) -> None:
        super().__init__()
        side = check_patch_size(patch_size)
        if num_heads < 1 or dim < 1 or dim % num_heads:
            raise ValueError(f"dim={dim} is not divisible by num_heads={num_heads}")
        self.dim = dim
        self.patch_size = (side, side)
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.rpe = rpe
        self.backend = check_backend(backend)
        if rpe:
            table = torch.empty((2 * side - 1) ** 2, num_heads)
            self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
            self.register_buffer("relative_position_index", reference.relative_position_index(side))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(check_probability("attn_drop", attn_drop))
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(check_probability("proj_drop", proj_drop))

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, patch_size={self.patch_size[0]}, num_heads={self.num_heads}, "
            f"backend={self.backend!r}"
        )


class IPSA(_Attention):
    """Inner-patch self-attention (paper, section 3.1).

    A drop-in for the official ``Attention`` of an IPSA block: ``proj(ipsa_attention(qkv(x)))`` with
    the parameters ``qkv``, ``proj`` and, where ``rpe``, ``relative_position_bias_table`` and the
    integer buffer ``relative_position_index``. The attention weights are not a tensor that a hook
    on ``attn_drop`` could see: ask for them with ``return_attention``.

    Args:
        dim: C.
        patch_size: N, or (N, N).
        num_heads: divides ``dim``.
        qkv_bias: whether ``qkv`` has a bias.
        qk_scale: factor on ``q k^T``; None (or 0, as in the official code): ``head_dim**-0.5``.
        attn_drop: probability of dropping an attention weight in training.
        proj_drop: probability of dropping an output value in training.
        rpe: whether a relative position bias is learned.
        backend: "auto", "triton" or "reference"; see `catkernels.functional`.
    """

    def __init__(
        self,
        dim: int,
        patch_size: int | tuple[int, int] = 7,
        num_heads: int = 3,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        rpe: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            dim, patch_size, num_heads, qkv_bias, qk_scale, attn_drop, proj_drop, rpe, backend
        )

    def forward(self, x: Tensor, return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Attend within each window.

        Args:
            x: a map (B, H, W, C), padded where N does not divide H or W, or tokens
                (windows, N*N, C) as the official module takes them.
            return_attention: also return the attention weights (B, windows, heads, N*N, N*N).

        Raises:
            ValueError: ``x`` is neither.
        """
        side = self.patch_size[0]
        check_floating(x)
        is_tokens = x.dim() == 3 and x.shape[1] == side**2
        if not (is_tokens or x.dim() == 4) or x.shape[-1] != self.dim:
            raise ValueError(
                f"IPSA needs a map (B, H, W, {self.dim}) or tokens (windows, {side**2}, "
                f"{self.dim}), got {tuple(x.shape)}"
            )
        if is_tokens:
            # a window of tokens is a map of one window
            result = self(reference.to_map(x, side, side), return_attention)
            if return_attention:
                return result[0].flatten(1, 2), result[1]
            return result.flatten(1, 2)
        return ipsa_layer(AttentionParts.of(self), x, side, self.backend, return_attention)


class CPSA(_Attention):
    """Cross-patch self-attention (paper, section 3.2).

    A drop-in for the official ``Attention`` of a CPSA block: `cpsa_attention` with the weights of
    ``qkv`` (3 N*N, N*N) and ``proj`` (N*N, N*N), which all channels share; one head, no position
    bias. Hooks as for `IPSA`.

    Args:
        patch_size: N, or (N, N).
        qkv_bias: whether ``qkv`` has a bias.
        qk_scale: factor on ``q k^T``; None (or 0, as in the official code): ``(N*N)**-0.5``.
        attn_drop: probability of dropping an attention weight in training.
        proj_drop: probability of dropping an output value in training.
        backend: "auto", "triton" or "reference"; see `catkernels.functional`.
    """

    def __init__(
        self,
        patch_size: int | tuple[int, int] = 7,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: Backend = "auto",
    ) -> None:
        dim = check_patch_size(patch_size) ** 2
        super().__init__(
            dim, patch_size, 1, qkv_bias, qk_scale, attn_drop, proj_drop, False, backend
        )

    def forward(self, x: Tensor, return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Attend among the patches of each channel.

        Args:
            x: a map (B, H, W, C), padded where N does not divide H or W, or tokens (B*C, P, N*N)
                as the official module takes them.
            return_attention: also return the attention weights (B, C, P, P).

        Raises:
            ValueError: ``x`` is neither.
        """
        side = self.patch_size[0]
        check_floating(x)
        if x.dim() == 3 and x.shape[-1] == side**2:
            # P patches one below the other are a map of one channel and one patch's width
            result = self(x.reshape(x.shape[0], x.shape[1] * side, side, 1), return_attention)
            if return_attention:
                return result[0].reshape(x.shape), result[1]
            return result.reshape(x.shape)
        if x.dim() != 4:
            raise ValueError(
                f"CPSA needs a map (B, H, W, C) or tokens (B*C, P, {side**2}), got {tuple(x.shape)}"
            )
        return cpsa_layer(AttentionParts.of(self), x, side, self.backend, return_attention)


def ipsa_layer(
    attn: AttentionParts,
    x: Tensor,
    patch_size: int,
    backend: Backend,
    return_attention: bool = False,
    norm: nn.LayerNorm | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """IPSA of a map (B, H, W, C) with these parts.

    With ``norm``, where `recomputes_norm` says that this is possible, it is IPSA of ``norm(x)``.
    """
    height, width = x.shape[1:3]
    plain = attn.qkv_is_plain and attn.proj_is_plain
    if not plain:
        # what such a child makes of a padded pixel only the child can say
        x = reference.pad_to_patches(x, patch_size)

    def attend(x: Tensor) -> tuple[Tensor, ...]:
        result = ipsa_attention(
            _project(attn, attn.qkv, x, patch_size)
            if norm is None
            else norm_linear(x, norm, attn.qkv),
            attn.table,
            num_heads=attn.num_heads,
            patch_size=patch_size,
            scale=attn.scale,
            qkv_bias=attn.qkv.bias if plain else None,
            dropout_p=attn.dropout_p,
            return_attention=return_attention,
            backend=backend,
        )
        output, *attention = result if return_attention else (result,)
        output = _project(attn, attn.proj, output, patch_size)
        return output if plain else output[:, :height, :width], *attention

    if plain and backend != "triton":
        weights = (*attn.qkv.parameters(), *attn.proj.parameters(), attn.table)
        if cpu.serves(x, *weights, dropout_p=attn.dropout_p, return_attention=return_attention):
            return attn.proj_drop(cpu.layer_in_slices(lambda part: attend(part)[0], x))
    output, *attention = attend(x)
    output = attn.proj_drop(output)
    return (output, *attention) if return_attention else output


def _project(attn: AttentionParts, layer: nn.Module, x: Tensor, patch_size: int) -> Tensor:
    """``layer``, which is qkv or proj, of a map (B, H, W, C)."""
    if attn.takes_any_axes:
        return layer(x)
    windows = reference.to_windows(x, patch_size)
    output = layer(windows.flatten(0, 1)).unflatten(0, windows.shape[:2])
    return reference.from_windows(output, patch_size, *x.shape[1:3])


def recomputes_norm(
    attn: AttentionParts, x: Tensor, patch_size: int, backend: Backend, norm: nn.Module
) -> bool:
    """Whether IPSA's kernels can train with ``norm(x)`` computed again in the backward pass.

    It is then not kept beside the map (B, H, W, C) that ``x`` is.
    """
    # a compiler decides by itself what to compute again
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if type(norm) is not nn.LayerNorm or is_intercepted(norm):
        return False
    if not (attn.qkv_is_plain and attn.proj_is_plain):
        return False
    if norm.normalized_shape != x.shape[-1:]:
        return False
    tensors = (x, *norm.parameters(), *attn.qkv.parameters())
    one_dtype = all(t.dtype == x.dtype for t in tensors) or autocast_is_on(x.device)
    return (
        one_dtype
        and any(t.requires_grad for t in tensors)
        and ipsa_runs_kernels(x, head_dim=attn.head_dim, patch_size=patch_size, backend=backend)
    )


def cpsa_layer(
    attn: AttentionParts,
    x: Tensor,
    patch_size: int,
    backend: Backend,
    return_attention: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """CPSA of a map (B, H, W, C) with these parts."""
    options = {
        "patch_size": patch_size,
        "scale": attn.scale,
        "dropout_p": attn.dropout_p,
        "return_attention": return_attention,
    }
    if attn.qkv_is_plain and attn.proj_is_plain:
        weights = (attn.qkv.weight, attn.qkv.bias, attn.proj.weight, attn.proj.bias)
        result = cpsa_attention(x, *weights, backend=backend, **options)
    elif backend == "triton":
        raise ValueError(
            "CPSA cannot use backend='triton': qkv or proj is no plain nn.Linear, or carries hooks "
            "or parametrisations, and the kernels only read weights. Use backend='auto'."
        )
    else:
        qkv, proj = _by_sequences(attn.qkv), _by_sequences(attn.proj)
        result = reference.cpsa_with_layers(x, qkv, proj, **options)
    output, *attention = result if return_attention else (result,)
    output = attn.proj_drop(output)
    return (output, *attention) if return_attention else output


def _by_sequences(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """``layer`` of the patches (B, C, P, N*N), which gets (B*C, P, N*N) as in the official code."""
    return lambda patches: layer(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])


def check_floating(x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor, got {kind}")
