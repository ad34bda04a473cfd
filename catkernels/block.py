"""The block of CAT: an attention and an MLP, each behind a norm and added to its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from catkernels import reference
from catkernels.adopted import StandIn
from catkernels.arguments import Backend, check_patch_size
from catkernels.layers import DropPath, Mlp
from catkernels.modules import (
    CPSA,
    IPSA,
    attend_in_windows,
    check_floating,
    check_input,
    cpsa_layer,
    ipsa_layer,
    projects_for_kernels,
)
from catkernels.ops.cpsa_residual import cpsa_residual
from catkernels.ops.linear import add_branch, linear_residual, norm_linear_residual
from catkernels.ops.norm import norm_residual
from catkernels.parts import AttentionParts, BlockParts, MlpParts, map_size
from catkernels.serving import (
    call_reasons,
    cpsa_joined_reasons,
    drop_factor,
    mlp_together,
    norm_reasons,
    proj_reasons,
    qkv_joins,
    residual_reasons,
    unserved_parts,
)
from catkernels.torch_state.hooks import is_intercepted
from catkernels.torch_state.precision import compute_dtype
from catkernels.trust import Trust

if TYPE_CHECKING:
    from typing_extensions import Self


class CATBlock(StandIn):
    """``x + drop_path(attn(norm1(x)))``, then ``x + drop_path(mlp(norm2(x)))``.

    The children and their parameters have the official names: ``norm1``, ``attn``, ``drop_path``,
    ``norm2``, ``mlp.fc1`` and ``mlp.fc2``. A map that N does not divide is padded with zeros after
    ``norm1`` and cropped after the attention, without a mask (paper, section 3.3).

    Args:
        dim: C.
        num_heads: heads of an IPSA block; a CPSA block has one, whatever is given.
        patch_size: N, or (N, N).
        mlp_ratio: hidden width of the MLP over C.
        qkv_bias: whether ``qkv`` has a bias.
        qk_scale: factor on ``q k^T``; None: ``head_dim**-0.5``, for CPSA ``(N*N)**-0.5``.
        drop: probability of dropping an output value of the attention or the MLP in training.
        attn_drop: probability of dropping an attention weight in training.
        drop_path: probability of skipping a branch for one image in training.
        act_layer: activation of the MLP.
        norm_layer: norm, called with C.
        attn_type: "ipsa" or "cpsa".
        rpe: whether IPSA learns a relative position bias.
        backend: "auto", "triton" or "reference"; see `catkernels.functional`.
    """

    CHILDREN = ("norm1", "attn", "drop_path", "norm2", "mlp")

    # norms of any class: kernels serve an `nn.LayerNorm` that nobody listens to
    norm1: Any
    norm2: Any
    drop_path: nn.Module
    mlp: nn.Module

    # The size of the map that tokens (B, H*W, C) are, set from outside before a call as in the
    # official code for dense tasks; the official classifier stores `input_resolution` instead.
    H: int | None = None
    W: int | None = None
    input_resolution: tuple[int, int] | None = None
    # That an official MLP is its parts.
    _mlp_trust: Trust | None = None

    OWN = StandIn.OWN | {"_mlp_trust", "patch_size"}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        patch_size: int | tuple[int, int] = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        attn_type: str = "ipsa",
        rpe: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.attn_type = attn_type
        self.patch_size = check_patch_size(patch_size)
        self.norm1 = norm_layer(dim)
        shared = (qkv_bias, qk_scale, attn_drop, drop)
        if attn_type == "ipsa":
            self.attn = IPSA(dim, patch_size, num_heads, *shared, rpe=rpe, backend=backend)
        elif attn_type == "cpsa":
            self.attn = CPSA(patch_size, *shared, backend=backend)
        else:
            raise ValueError(f"attn_type must be 'ipsa' or 'cpsa', got {attn_type!r}")
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer, drop)

    @classmethod
    def adopt(cls, block: nn.Module) -> Self:
        """A block with the very children, hooks and mode of an official one, which it remembers."""
        adopted, theirs = super().adopt(block), BlockParts.of(block)
        adopted.attn_type = theirs.attn_type
        adopted.patch_size = check_patch_size(theirs.patch_size)
        return adopted

    def _tell_original(self) -> None:
        super()._tell_original()
        original: Any = self.original
        if check_patch_size(original.patch_size) != self.patch_size:
            original.patch_size = self.patch_size

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C), or tokens (B, H*W, C) where H and W are set, to the same shape.

        Raises:
            TypeError: ``x`` is no floating-point tensor, or of another dtype than the weights.
            ValueError: ``x`` is neither, H and W do not fit it, or it is on another device.
        """
        if self.original_was_changed:
            return self.call_original(x)
        check_floating(x)
        height, width = self._map_size(x)
        tokens = x.flatten(1, 2) if x.dim() == 4 else x
        serves = not call_reasons(x, self.backend)
        tokens = self._add_attention(tokens, (height, width), serves)
        if tokens.dtype != x.dtype:
            # an attention of somebody's own may give another one
            serves = not call_reasons(tokens, self.backend)
        return self._add_mlp(tokens.reshape(x.shape), serves)

    def unsupported_parts(self, x: Tensor, backend: Backend | None = None) -> dict[str, list[str]]:
        """Why the Triton kernels cannot serve parts of a call with ``x``, beside the attention.

        Where they serve the attention, `catkernels.unsupported_reasons` says. Autocast, gradients
        and the block's mode are as they are when this is called.

        Args:
            x: as `forward` takes it.
            backend: what is asked for; None: the block's own.

        Returns:
            One sentence a reason, for the "norms", the "MLP" and, of an IPSA block, its
            "projections": qkv with the norm, proj with the residual. No sentence where kernels
            serve.
        """
        return unserved_parts(
            x,
            self.backend if backend is None else backend,
            norm1=self.norm1,
            norm2=self.norm2,
            attn=self.read_attention(),
            mlp=self.read_mlp(),
            drop_path=self.drop_path,
            attn_type=self.attn_type,
            patch_size=self.patch_size,
            num_patches=self._num_patches(x),
        )

    def _num_patches(self, x: Tensor) -> int:
        """P of a map, or of tokens: two where they are of a map whose size is not known."""
        if x.dim() == 4:
            return reference.num_patches(x.shape[1], x.shape[2], self.patch_size)
        return BlockParts.of(self).num_patches

    def _map_size(self, x: Tensor) -> tuple[int, int]:
        if x.dim() == 4:
            return x.shape[1], x.shape[2]
        size = map_size(self)
        if size is None:
            raise ValueError(
                "tokens (B, H*W, C) need the size of their map: set H and W of the block, or give "
                f"it a map (B, H, W, C); got {tuple(x.shape)}"
            )
        if x.dim() != 3 or x.shape[1] != size[0] * size[1]:
            raise ValueError(
                f"x must be a map (B, H, W, C) or tokens (B, {size[0]} * {size[1]}, C), "
                f"got {tuple(x.shape)}"
            )
        return size

    def _add_attention(self, tokens: Tensor, size: tuple[int, int], serves: bool) -> Tensor:
        """``x + drop_path(attn(norm1(x)))`` of tokens (B, H*W, C), which a map of a size is."""
        parts = self.read_attention()
        if (
            parts is not None
            and type(self.norm1) is nn.LayerNorm
            and not is_intercepted(self.norm1)
        ):
            # before the norm complains in words of its own
            check_input(tokens, parts)
        if serves and parts is not None and parts.plain_layers:
            x, layers = reference.to_map(tokens, *size), parts.plain_layers
            if self.attn_type == "ipsa":
                if projects_for_kernels(parts, x, self.patch_size, self.backend):
                    return self._add_ipsa(tokens, size, parts, *layers)
            elif self._joins_cpsa(parts, x):
                return self._add_cpsa(x, parts, *layers).flatten(1, 2)
        if serves and not norm_reasons(self.norm1, tokens):
            normed, tokens = norm_residual(tokens, self.norm1)
        else:
            normed = self.norm1(tokens)
        attended = self._attend(reference.to_map(normed, *size), parts)
        return self._add(tokens, attended.flatten(1, 2), serves)

    def _add_ipsa(
        self,
        tokens: Tensor,
        size: tuple[int, int],
        parts: AttentionParts,
        qkv: nn.Linear,
        proj: nn.Linear,
    ) -> Tensor:
        """The same by kernels, for which its linear layers are just their weights and biases."""
        if qkv_joins(self.norm1, qkv, tokens):
            projected, tokens = norm_linear_residual(tokens, self.norm1, qkv.weight, qkv.bias)
        else:
            normed = self.norm1(tokens)
            check_input(normed, parts)
            projected = qkv(normed)
        options = (self.patch_size, self.backend)
        attended, _ = attend_in_windows(parts, reference.to_map(projected, *size), *options)
        attended = attended.flatten(1, 2)
        if proj_reasons(proj, parts, self.drop_path, tokens):
            return self._add(tokens, parts.proj_drop(proj(attended)), serves=True)
        factor = drop_factor(self.drop_path, attended.dtype, tokens)
        return linear_residual(tokens, attended, proj.weight, proj.bias, factor)

    def _joins_cpsa(self, parts: AttentionParts, x: Tensor) -> bool:
        """Whether `_add_cpsa` serves a map (B, H, W, C)."""
        sizes = {"patch_size": self.patch_size, "num_patches": self._num_patches(x)}
        return not cpsa_joined_reasons(self.norm1, parts, self.drop_path, x, **sizes)

    def _add_cpsa(
        self, x: Tensor, parts: AttentionParts, qkv: nn.Linear, proj: nn.Linear
    ) -> Tensor:
        """The same of a map (B, H, W, C) by CPSA's kernel, with the norm and residual in it."""
        factor = drop_factor(self.drop_path, compute_dtype(x), x)
        layers, side = (self.norm1, qkv, proj), self.patch_size
        return cpsa_residual(x, *layers, factor, patch_size=side, scale=parts.scale)

    def _attend(self, x: Tensor, parts: AttentionParts | None) -> Tensor:
        """``attn`` of a map (B, H, W, C), which may be known to be nothing but its parts."""
        attn = self.attn
        if parts is not None and not isinstance(attn, IPSA | CPSA):
            layer = ipsa_layer if self.attn_type == "ipsa" else cpsa_layer
            return layer(parts, x, self.patch_size, self.backend)[0]
        if isinstance(attn, IPSA | CPSA) or not self.attention_takes_tokens:
            return attn(x)
        return self._attend_through_tokens(x)

    def _add(self, x: Tensor, branch: Tensor, serves: bool) -> Tensor:
        """``x + drop_path(branch)``."""
        if not serves or residual_reasons(self.drop_path):
            # a sum, no view of one: FSDP2 marks the result, and a view that changes loses its mark
            return x + self.drop_path(branch)
        return add_branch(x, branch, drop_factor(self.drop_path, branch.dtype, x))

    def _add_mlp(self, x: Tensor, serves: bool) -> Tensor:
        """``x + drop_path(mlp(norm2(x)))``."""
        mlp = self.read_mlp() if serves else None
        if mlp is not None:
            together = mlp_together(self.norm2, mlp, self.drop_path, x)
            if together is not None:
                factor = drop_factor(self.drop_path, compute_dtype(x), x)
                return together(x, self.norm2, mlp.fc1, mlp.fc2, factor)
        if serves and not norm_reasons(self.norm2, x):
            normed, x = norm_residual(x, self.norm2)
        else:
            normed = self.norm2(x)
        return self._add(x, self.mlp(normed), serves)

    def read_mlp(self) -> MlpParts | None:
        """What the MLP consists of, or None where its call may do more than these parts."""
        mlp, trust = self.mlp, self._mlp_trust
        known = type(mlp) is Mlp or (trust is not None and trust.holds_for(mlp))
        return MlpParts.of(mlp) if known and not is_intercepted(mlp) else None

    def trust_mlp(self) -> None:
        """Take the parts of the MLP, whose class is none of ours, for all that there is to it."""
        self._mlp_trust = Trust.of(self.mlp)

    def _attend_through_tokens(self, x: Tensor) -> Tensor:
        """Call the attention itself with the tokens that official blocks give theirs."""
        height, width = x.shape[1:3]
        padded = reference.pad_to_patches(x, self.patch_size)
        split, join = (
            (reference.to_windows, reference.from_windows)
            if self.attn_type == "ipsa"
            else (reference.to_patches, reference.from_patches)
        )
        tokens = split(padded, self.patch_size)
        output = self.attn(tokens.flatten(0, 1)).reshape(tokens.shape)
        return join(output, self.patch_size, *padded.shape[1:3])[:, :height, :width]

    def extra_repr(self) -> str:
        return f"attn_type={self.attn_type!r}, patch_size={self.patch_size}"
