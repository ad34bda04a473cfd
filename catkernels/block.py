"""The block of CAT: an attention and an MLP, each behind a norm and added to its input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from catkernels import reference
from catkernels.functional import Backend, check_backend, check_patch_size, check_probability
from catkernels.modules import (
    CPSA,
    IPSA,
    check_floating,
    cpsa_layer,
    ipsa_layer,
    recomputes_norm,
)
from catkernels.torch_state.hooks import is_intercepted, share_hooks

# What an official block consists of.
CHILDREN = ("norm1", "attn", "drop_path", "norm2", "mlp")
# The names under which official blocks keep the size of the map that their tokens are.
_MAP_SIZE = {"H", "W", "input_resolution"}


class CATBlock(nn.Module):
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

    # The size of the map that tokens (B, H*W, C) are, set from outside before a call as in the
    # official code for dense tasks; the official classifier stores `input_resolution` instead.
    H: int | None = None
    W: int | None = None
    input_resolution: tuple[int, int] | None = None

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
    def adopt(cls, block: nn.Module) -> CATBlock:
        """A block with the very children, hooks and mode of an official one, which it remembers."""
        adopted = cls.__new__(cls)
        nn.Module.__init__(adopted)
        share_hooks(block, adopted)
        for name in _MAP_SIZE & vars(block).keys():
            setattr(adopted, name, getattr(block, name))
        for name in CHILDREN:
            setattr(adopted, name, getattr(block, name))
        adopted.attn_type = block.attn_type
        adopted.patch_size = check_patch_size(block.patch_size)
        adopted.training = block.training
        adopted._backend = "auto"
        # an `IPSA` or `CPSA` of the user's own has one already
        adopted._former_backend = adopted.backend
        # in a tuple, so that it is no child and its parameters are not listed twice
        adopted._adopted = (block,)
        return adopted

    @property
    def backend(self) -> Backend:
        """What the attention asks for. It has one of its own where it is an `IPSA` or `CPSA`."""
        return self.attn.backend if isinstance(self.attn, IPSA | CPSA) else self._backend

    @backend.setter
    def backend(self, backend: Backend) -> None:
        self._backend = check_backend(backend)
        if isinstance(self.attn, IPSA | CPSA):
            self.attn.backend = backend

    @property
    def is_adopted(self) -> bool:
        """Whether this block stands in the place of an official one."""
        return "_adopted" in vars(self)

    def release(self) -> nn.Module:
        """The block that `adopt` took over, with what this one now is.

        That is its children, parameters and buffers, whenever they came, its mode, H and W.
        """
        (block,) = self._adopted
        block.training = self.training
        self.backend = self._former_backend
        share_hooks(self, block)
        for registry in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            getattr(block, registry).update(getattr(self, registry))
        for name in _MAP_SIZE & vars(block).keys():
            setattr(block, name, getattr(self, name))
        return block

    def __getattr__(self, name: str):
        """What an adopted block lacks, such as the official `flops`, the official one has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not self.is_adopted or name.startswith("__"):
                raise
            return getattr(self._adopted[0], name)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C), or tokens (B, H*W, C) where H and W are set, to the same shape.

        Raises:
            TypeError: ``x`` is no floating-point tensor.
            ValueError: ``x`` is neither, or H and W do not fit it.
        """
        check_floating(x)
        height, width = self._map_size(x)
        tokens = x.flatten(1, 2) if x.dim() == 4 else x
        attended = self._attend(tokens, (height, width))
        tokens = tokens + self.drop_path(attended.flatten(1, 2))
        branch = self.drop_path(self.mlp(self.norm2(tokens)))
        # a sum, no view of one: FSDP2 marks the result, and a view that is changed loses its mark
        return tokens.reshape(x.shape) + branch.reshape(x.shape)

    def _map_size(self, x: Tensor) -> tuple[int, int]:
        if x.dim() == 4:
            return x.shape[1], x.shape[2]
        size = self.input_resolution if self.H is None or self.W is None else (self.H, self.W)
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
        return tuple(size)

    def _attend(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """``attn(norm1(tokens))`` of tokens (B, H*W, C), as a map (B, H, W, C)."""
        attn, options = self.attn, (self.patch_size, self.backend)
        if self.attn_type == "ipsa" and _is_its_children(attn):
            x = tokens.unflatten(1, size)
            if recomputes_norm(attn, x, *options, self.norm1):
                return ipsa_layer(attn, x, *options, norm=self.norm1)
        x = self.norm1(tokens).unflatten(1, size)
        if isinstance(attn, IPSA | CPSA):
            return attn(x)
        if needs_its_own_call(attn):
            return self._attend_through_tokens(x)
        layer = ipsa_layer if self.attn_type == "ipsa" else cpsa_layer
        return layer(attn, x, *options)

    def _attend_through_tokens(self, x: Tensor) -> Tensor:
        """Call the official attention itself, whose hooks then see the tokens they expect."""
        height, width = x.shape[1:3]
        padded = reference.pad_to_patches(x, self.patch_size)
        split, join = (
            (reference.to_windows, reference.from_windows)
            if self.attn_type == "ipsa"
            else (reference.to_patches, reference.from_patches)
        )
        tokens = split(padded, self.patch_size)
        output = self.attn(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
        return join(output, self.patch_size, *padded.shape[1:3])[:, :height, :width]

    def extra_repr(self) -> str:
        return f"attn_type={self.attn_type!r}, patch_size={self.patch_size}"


def needs_its_own_call(attn: nn.Module) -> bool:
    """Whether somebody listens to an official attention, or to parts that ours would not call."""
    parts = (attn, attn.attn_drop, getattr(attn, "softmax", None))
    return any(part is not None and is_intercepted(part) for part in parts)


def _is_its_children(attn: nn.Module) -> bool:
    """Whether to compute with an attention's children is all that its own call would do."""
    overridden = isinstance(attn, IPSA) and type(attn) is not IPSA
    return not overridden and not needs_its_own_call(attn)


class Mlp(nn.Module):
    """``fc2(act(fc1(x)))``, (.., C) -> the same, with dropout after each of the two halves."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(check_probability("drop", drop))

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class DropPath(nn.Module):
    """Stochastic depth: in training, zero the branch of an image with probability ``drop_prob``.

    Tensors (B, ..) keep their shape; what remains is scaled by ``1 / (1 - drop_prob)``.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = check_probability("drop_path", drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop_prob:
            return x
        keep = 1 - self.drop_prob
        mask = torch.empty(x.shape[0], *(1,) * (x.dim() - 1), dtype=x.dtype, device=x.device)
        return x * mask.bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"
