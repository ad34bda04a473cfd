"""IPSA and CPSA as modules, with the official parameter names.

`ipsa_layer` and `cpsa_layer` work with the parts of any module of that structure, ours or the
official code's, so that an adopted block and a block of our own share one path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from catkernels import cpu, reference
from catkernels.arguments import Backend, check_backend, check_patch_size, check_probability
from catkernels.choice import ipsa_runs_kernels
from catkernels.functional import cpsa_attention, ipsa_attention
from catkernels.parts import AttentionParts, is_our_index
from catkernels.torch_state.precision import autocast_is_on
from catkernels.torch_state.tensors import values_can_be_read


class _Attention(nn.Module):
    """What IPSA and CPSA share: the official parameters, and tokens or a map as the input."""

    def __init__(
        self,
        *,
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

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """As every module does, but with an error for a bias table in another order than ours."""
        *_, errors = arguments
        name = f"{prefix}relative_position_index"
        index: Any = state_dict.get(name)
        side = self.patch_size[0]
        # of other shapes PyTorch complains
        is_index = isinstance(index, Tensor) and index.shape == (side**2, side**2)
        if self.rpe and is_index and values_can_be_read(index) and not is_our_index(index, side):
            errors.append(f"{name} orders the rows of the bias table in another way")
        super()._load_from_state_dict(state_dict, prefix, *arguments)

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
            dim=dim,
            patch_size=patch_size,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            rpe=rpe,
            backend=backend,
        )

    def forward(self, x: Tensor, return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Attend within each window.

        Args:
            x: a map (B, H, W, C), padded where N does not divide H or W, or tokens
                (windows, N*N, C) as the official module takes them.
            return_attention: also return the attention weights (B, windows, heads, N*N, N*N).

        Raises:
            TypeError: ``x`` is no floating-point tensor, or of another dtype than the weights.
            ValueError: ``x`` is neither, or on another device; or ``backend="triton"`` cannot serve
                the call.
        """
        side = self.patch_size[0]
        check_floating(x)
        is_tokens = x.dim() == 3 and x.shape[1] == side**2
        if not (is_tokens or x.dim() == 4) or x.shape[-1] != self.dim:
            raise ValueError(
                f"IPSA needs a map (B, H, W, {self.dim}) or tokens (windows, {side**2}, "
                f"{self.dim}), got {tuple(x.shape)}"
            )
        # a window of tokens is a map of one window
        x_map = x.reshape(-1, side, side, self.dim) if is_tokens else x
        parts = AttentionParts.of(self)
        output, attention = ipsa_layer(parts, x_map, side, self.backend, return_attention)
        output = output.reshape(x.shape)
        return output if attention is None else (output, attention)


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
        super().__init__(
            dim=check_patch_size(patch_size) ** 2,
            patch_size=patch_size,
            num_heads=1,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            rpe=False,
            backend=backend,
        )

    def forward(self, x: Tensor, return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Attend among the patches of each channel.

        Args:
            x: a map (B, H, W, C), padded where N does not divide H or W, or tokens (B*C, P, N*N)
                as the official module takes them.
            return_attention: also return the attention weights (B, C, P, P).

        Raises:
            TypeError: ``x`` is no floating-point tensor, or of another dtype than the weights.
            ValueError: ``x`` is neither, or on another device; or ``backend="triton"`` cannot serve
                the call.
        """
        side = self.patch_size[0]
        check_floating(x)
        is_tokens = x.dim() == 3 and x.shape[-1] == side**2
        if not is_tokens and x.dim() != 4:
            raise ValueError(
                f"CPSA needs a map (B, H, W, C) or tokens (B*C, P, {side**2}), got {tuple(x.shape)}"
            )
        # P patches one below the other are a map of one channel and one patch's width
        x_map = x.reshape(x.shape[0], x.shape[1] * side, side, 1) if is_tokens else x
        parts = AttentionParts.of(self)
        output, attention = cpsa_layer(parts, x_map, side, self.backend, return_attention)
        output = output.reshape(x.shape)
        return output if attention is None else (output, attention)


def ipsa_layer(
    attn: AttentionParts,
    x: Tensor,
    patch_size: int,
    backend: Backend,
    return_attention: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """IPSA of a map (B, H, W, C) with these parts, and the attention weights where asked for."""
    check_input(x, attn)
    height, width = x.shape[1:3]
    plain = attn.plain_layers
    if plain is None:
        # what such a child makes of a padded pixel only the child can say
        x = reference.pad_to_patches(x, patch_size)

    def attend(x: Tensor) -> tuple[Tensor, Tensor | None]:
        qkv = _project(attn, attn.qkv, x, patch_size)
        output, attention = attend_in_windows(attn, qkv, patch_size, backend, return_attention)
        output = _project(attn, attn.proj, output, patch_size)
        return output if plain is not None else output[:, :height, :width], attention

    if plain is not None and backend != "triton":
        weights = [tensor for layer in plain for tensor in (layer.weight, layer.bias)]
        if cpu.serves(
            x, *weights, attn.table, dropout_p=attn.dropout_p, return_attention=return_attention
        ):
            return attn.proj_drop(cpu.layer_in_slices(lambda x: attend(x)[0], x)), None
    output, attention = attend(x)
    return attn.proj_drop(output), attention


def attend_in_windows(
    attn: AttentionParts,
    qkv: Tensor,
    patch_size: int,
    backend: Backend,
    return_attention: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """IPSA between its linear layers: of what ``qkv`` gave (B, H, W, 3C), before ``proj``."""
    plain = attn.plain_layers
    return _pair(
        ipsa_attention(
            qkv,
            attn.table,
            num_heads=attn.num_heads,
            patch_size=patch_size,
            scale=attn.scale,
            qkv_bias=None if plain is None else plain[0].bias,
            dropout_p=attn.dropout_p,
            return_attention=return_attention,
            backend=backend,
        )
    )


def _project(attn: AttentionParts, layer: nn.Module, x: Tensor, patch_size: int) -> Tensor:
    """``layer``, which is qkv or proj, of a map (B, H, W, C) that N divides or that is its own."""
    if attn.takes_any_axes:
        return layer(x)
    windows = reference.to_windows(x, patch_size)
    output = layer(windows.flatten(0, 1))
    output = output.reshape(*windows.shape[:3], output.shape[-1])
    return reference.from_windows(output, patch_size, *x.shape[1:3])


def projects_for_kernels(
    attn: AttentionParts, x: Tensor, patch_size: int, backend: Backend
) -> bool:
    """Whether kernels serve IPSA of ``x`` through plain layers, whose dtype is that of ``x``.

    Raises:
        ValueError: ``backend="triton"`` cannot serve the call.
    """
    weights = (attn.qkv.weight, attn.qkv.bias)
    one_dtype = all(w is None or w.dtype == x.dtype for w in weights) or autocast_is_on(x.device)
    return one_dtype and ipsa_runs_kernels(
        x, head_dim=attn.head_dim, patch_size=patch_size, backend=backend
    )


def cpsa_layer(
    attn: AttentionParts,
    x: Tensor,
    patch_size: int,
    backend: Backend,
    return_attention: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """CPSA of a map (B, H, W, C) with these parts, and the attention weights where asked for."""
    check_input(x, attn)
    plain = attn.plain_layers
    if plain is not None:
        qkv, proj = plain
        result = cpsa_attention(
            x,
            qkv.weight,
            qkv.bias,
            proj.weight,
            proj.bias,
            patch_size=patch_size,
            scale=attn.scale,
            dropout_p=attn.dropout_p,
            return_attention=return_attention,
            backend=backend,
        )
    elif backend == "triton":
        raise ValueError(
            "CPSA cannot use backend='triton': qkv or proj is no plain nn.Linear, or carries hooks "
            "or parametrisations, and the kernels only read weights. Use backend='auto'."
        )
    else:
        result = reference.cpsa_with_layers(
            x,
            _by_sequences(attn.qkv),
            _by_sequences(attn.proj),
            patch_size=patch_size,
            scale=attn.scale,
            dropout_p=attn.dropout_p,
            return_attention=return_attention,
        )
    output, attention = _pair(result)
    return attn.proj_drop(output), attention


def _by_sequences(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """``layer`` of the patches (B, C, P, N*N), which gets (B*C, P, N*N) as in the official code."""

    def apply(patches: Tensor) -> Tensor:
        output = layer(patches.flatten(0, 1))
        return output.reshape(*patches.shape[:3], output.shape[-1])

    return apply


def _pair(result: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    """What an attention returns, with None for weights that were not asked for."""
    return result if isinstance(result, tuple) else (result, None)


def check_floating(x: Tensor) -> None:
    """Raise a TypeError unless ``x`` is a floating-point tensor."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor, got {kind}")


def check_input(x: Tensor, attn: AttentionParts) -> None:
    """Raise unless an attention can compute with ``x`` and drop weights as it is asked to.

    ``x`` must be where its weights are, in their dtype or autocast's. What stands in the place of a
    plain ``qkv`` takes what it takes.

    Raises:
        TypeError: ``x`` is of another dtype, or ``attn_drop`` would have to be called.
        ValueError: ``x`` is on another device.
    """
    if not isinstance(attn.attn_drop, nn.Dropout | nn.Identity):
        raise TypeError(
            f"attn_drop must be an nn.Dropout or nn.Identity, got {type(attn.attn_drop).__name__}: "
            "the attention weights are no tensor that it could be given"
        )
    weight = attn.qkv.weight if attn.qkv_is_plain else None
    if isinstance(weight, Tensor):
        check_like_weight("x", x, weight)


def check_like_weight(name: str, x: Tensor, weight: Tensor) -> None:
    """Raise unless the argument ``x`` of that name is where ``weight`` is, in a dtype for it.

    Raises:
        TypeError: ``x`` is of another dtype, and no autocast makes them one.
        ValueError: ``x`` is on another device.
    """
    if x.device != weight.device:
        raise ValueError(
            f"{name} is on {x.device} but the layer's weights are on {weight.device}: "
            "move both to one device"
        )
    if x.dtype == weight.dtype:
        return
    if torch.float64 in (x.dtype, weight.dtype) or not autocast_is_on(x.device):
        raise TypeError(
            f"{name} is {x.dtype} but the layer's weights are {weight.dtype}: give them one dtype, "
            f"by {name}.to({weight.dtype}) or layer.to({x.dtype}), or use autocast"
        )
