"""What an attention or a block of CAT consists of, whoever wrote it: read once, typed.

Everything that is known here about other people's modules is known by the official names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from catkernels.arguments import check_patch_size
from catkernels.reference import num_patches, relative_position_index
from catkernels.torch_state.hooks import is_intercepted
from catkernels.torch_state.tensors import is_wrapper


class AttentionParts(NamedTuple):
    """What an attention in the official structure consists of at this moment.

    Attributes:
        qkv: what makes queries, keys and values of the tokens.
        attn_drop: the dropout of attention weights.
        proj: the linear layer behind the attention.
        proj_drop: the dropout of what ``proj`` gives.
        softmax: the module for it, which official attentions have and ours do not.
        num_heads: heads.
        scale: factor on ``q k^T``.
        table: the relative position bias ((2N - 1)**2, heads), or None.
        head_dim: D, what ``qkv`` gives each head, which need not be C / heads.
        dropout_p: the probability with which attention weights are dropped at present.
        qkv_is_plain: whether ``qkv`` is just its weight and bias; see `is_plain_linear`.
        proj_is_plain: the same of ``proj``.
        takes_any_axes: whether ``qkv`` and ``proj`` compute as linear layers do, whatever axes
            come before the last; what stands in their place may look at those.
    """

    qkv: nn.Module
    attn_drop: nn.Module
    proj: nn.Module
    proj_drop: nn.Module
    softmax: nn.Module | None
    num_heads: int
    scale: float
    table: Tensor | None
    head_dim: int
    dropout_p: float
    qkv_is_plain: bool
    proj_is_plain: bool
    takes_any_axes: bool

    @classmethod
    def of(cls, attn: Any) -> AttentionParts:
        """Read an attention, ours or one in whose place ours could stand."""
        qkv, proj, attn_drop = attn.qkv, attn.proj, attn.attn_drop
        plain = is_plain_linear(qkv), is_plain_linear(proj)
        # an adapter in the place of ``qkv`` may not say how wide it is
        width = qkv.out_features if plain[0] else getattr(qkv, "out_features", 3 * attn.dim)
        return cls(
            qkv=qkv,
            attn_drop=attn_drop,
            proj=proj,
            proj_drop=attn.proj_drop,
            softmax=getattr(attn, "softmax", None),
            num_heads=attn.num_heads,
            scale=attn.scale,
            table=attn.relative_position_bias_table if attn.rpe else None,
            head_dim=width // 3 // attn.num_heads,
            dropout_p=_dropout_probability(attn_drop),
            qkv_is_plain=plain[0],
            proj_is_plain=plain[1],
            takes_any_axes=all(plain) or (_computes_linearly(qkv) and _computes_linearly(proj)),
        )

    @property
    def plain_layers(self) -> tuple[nn.Linear, nn.Linear] | None:
        """``qkv`` and ``proj`` where both are just their weights and biases, which may be read."""
        qkv, proj = self.qkv, self.proj
        if not (self.qkv_is_plain and self.proj_is_plain):
            return None
        # both are, and a type checker is to know
        return (qkv, proj) if isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear) else None

    @property
    def drops_output(self) -> bool:
        """Whether values that ``proj`` gives are dropped at present."""
        return _dropout_probability(self.proj_drop) > 0

    @property
    def is_arithmetic(self) -> bool:
        """Whether the softmax and the dropouts, which ours does not call, are just what they say.

        Nobody listens to them, and none is of a class of its own.
        """
        dropouts = (self.attn_drop, self.proj_drop)
        known = all(type(part) in (nn.Dropout, nn.Identity) for part in dropouts)
        softmax = self.softmax
        known = known and (softmax is None or (type(softmax) is nn.Softmax and softmax.dim == -1))
        return known and not any(
            is_intercepted(part) for part in (*dropouts, softmax) if part is not None
        )


@dataclass(frozen=True)
class MlpParts:
    """What an MLP in the official structure consists of at this moment.

    Attributes:
        fc1, fc2: the linear layers.
        act: the activation between them.
        drops: the dropouts behind each of them; one module may be both.
    """

    fc1: Any
    act: Any
    fc2: Any
    drops: tuple[nn.Module, nn.Module]

    @classmethod
    def of(cls, mlp: Any) -> MlpParts:
        """Read an MLP, ours or one of which `has_mlp_parts`."""
        drops = (mlp.drop, mlp.drop) if "drop" in mlp._modules else (mlp.drop1, mlp.drop2)
        return cls(mlp.fc1, mlp.act, mlp.fc2, drops)

    def __call__(self, x: Tensor) -> Tensor:
        """``fc2(act(fc1(x)))`` with the dropouts, (.., C) -> the same."""
        first, second = self.drops
        return second(self.fc2(first(self.act(self.fc1(x)))))

    @property
    def drops_values(self) -> bool:
        """Whether values are dropped at present."""
        return any(_dropout_probability(drop) > 0 for drop in self.drops)


@dataclass(frozen=True)
class BlockParts:
    """What a block in the official structure consists of, as far as a report of it says.

    Attributes:
        attn_type: "ipsa" or "cpsa", or what else the block says.
        patch_size: N, or what else the block says.
        side: N, or None where the patches are no squares.
        map_size: H and W of the map that tokens are, or None where it is not known.
        channels: C, or None where nothing says it.
        num_heads: heads, or None.
        attn: the attention.
    """

    attn_type: str
    patch_size: Any
    side: int | None
    map_size: tuple[int, int] | None
    channels: int | None
    num_heads: int | None
    attn: nn.Module

    @classmethod
    def of(cls, block: Any) -> BlockParts:
        """Read a block that has an attention, ours or one in whose place ours could stand."""
        patch_size = getattr(block, "patch_size", "?")
        return cls(
            attn_type=getattr(block, "attn_type", "?"),
            patch_size=patch_size,
            side=patch_side(patch_size),
            map_size=map_size(block),
            channels=_channels(block),
            num_heads=getattr(block.attn, "num_heads", None),
            attn=block.attn,
        )

    @property
    def num_patches(self) -> int:
        """P where the map's size is known, else two, as if for any size with more than one."""
        side = self.side or 1
        height, width = self.map_size or (side, 2 * side)
        return num_patches(height, width, side)


def _channels(block: Any) -> int | None:
    """C of a block, by its norm, by what it says of itself, or by what its MLP takes."""
    norm, mlp = block._modules.get("norm1"), block._modules.get("mlp")
    if isinstance(norm, nn.LayerNorm):
        return norm.normalized_shape[-1]
    if isinstance(getattr(block, "dim", None), int):
        return int(block.dim)
    layers = () if mlp is None else mlp.modules()
    return next((layer.in_features for layer in layers if isinstance(layer, nn.Linear)), None)


def has_official_parts(attn: nn.Module) -> bool:
    """Whether `AttentionParts` can be read of a module itself, and not of what it is put around."""
    children = {"qkv", "attn_drop", "proj", "proj_drop"}
    attributes = ("num_heads", "scale", "rpe")
    return children <= attn._modules.keys() and all(hasattr(attn, name) for name in attributes)


def has_mlp_parts(mlp: nn.Module) -> bool:
    """Whether `MlpParts` can be read of a module, which has no others."""
    names = {name for name, child in mlp._modules.items() if type(child) is not nn.Identity}
    names |= {name for name in ("drop", "drop1", "drop2") if name in mlp._modules}
    dropouts = {"drop"}, {"drop1", "drop2"}
    known = any(names == {"fc1", "act", "fc2"} | drops for drops in dropouts)
    return known and not mlp._parameters and not mlp._buffers


def map_size(block: Any) -> tuple[int, int] | None:
    """H and W of the map that a block's tokens are, under any of the official names."""
    height, width = getattr(block, "H", None), getattr(block, "W", None)
    if height is not None and width is not None:
        return height, width
    resolution = getattr(block, "input_resolution", None)
    return None if resolution is None else (resolution[0], resolution[1])


def patch_side(patch_size: Any) -> int | None:
    """N, or None where the patches are no squares."""
    try:
        return check_patch_size(patch_size)
    except ValueError:
        return None


def is_our_index(index: Tensor, side: int) -> bool:
    """Whether an index into the bias table of N x N pixels orders it as ours does.

    On the meta device it has no values and is trusted.
    """
    if index.shape != (side**2, side**2):
        return False
    return index.is_meta or torch.equal(index.long(), relative_position_index(side, index.device))


def is_plain_linear(module: nn.Module) -> bool:
    """Whether ``module`` is just its weight and bias.

    It then is no subclass, carries no parametrisation or hook, and its parameters are no wrappers
    around quantised values, which only operators of their own can read.
    """
    if type(module) is not nn.Linear or is_intercepted(module):
        return False
    # by name: to list a module's parameters takes longer than all the rest
    return not (is_wrapper(module.weight) or is_wrapper(module.bias))


def _computes_linearly(module: nn.Module) -> bool:
    """Whether a call is `torch.nn.Linear`'s, whatever its weight is made of."""
    return type(module).forward is nn.Linear.forward and not is_intercepted(module)


def _dropout_probability(dropout: nn.Module) -> float:
    """The probability with which an ``nn.Dropout`` (or ``nn.Identity``) drops at present."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
