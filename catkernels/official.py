"""CAT in the official structure and order of operations: what everything here is compared with.

The parameters, the blocks' attributes and every copy of a reshaped tensor are those of the official
implementation (linhezheng19/CAT); the code is our own. `patch` works on it as on the original.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from catkernels import cat
from catkernels.cat import CATOptions
from catkernels.layers import DropPath, Mlp
from catkernels.reference import relative_position_index, to_map

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CAT(cat.CAT):
    """`catkernels.CAT`, computed as the official code does.

    The classifier's blocks know their map's size from the start, and N must divide it; the
    backbone's have it set before each call, and pad.

    Args:
        checkpoint_always: recompute every block in the backward pass whatever ``use_checkpoint``
            says, as the official classification and segmentation code does.
        pads: give a classifier the dense variant of the blocks, which runs at any size.
        options: the arguments of `catkernels.CAT`, except ``backend``.
    """

    def __init__(
        self,
        *,
        checkpoint_always: bool = False,
        pads: bool = False,
        **options: Unpack[CATOptions],
    ) -> None:
        self.layer_class = AlwaysCheckpointedLayer if checkpoint_always else CATLayer
        self.pads = pads
        super().__init__(**options)

    def _make_layer(self, *, input_resolution: tuple[int, int], **options: Any) -> nn.Module:
        del options["backend"]
        return self.layer_class(
            input_resolution=None if self.is_backbone or self.pads else input_resolution, **options
        )


class CATLayer(cat.CATLayer):
    """One stage, whose blocks exchange tokens (B, H*W, C)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        size = x.shape[1:3]
        tokens = x.flatten(1, 2)
        block: Any  # where patched, one of ours
        for blocks in zip(
            self.pre_ipsa_blocks, self.cpsa_blocks, self.post_ipsa_blocks, strict=True
        ):
            for block in blocks:
                if hasattr(block, "H"):
                    block.H, block.W = size
                tokens = self.run(block, tokens)
        x = to_map(tokens, *size)
        return x, x if self.downsample is None else self.downsample(x)

    def run(self, block: nn.Module, tokens: Tensor) -> Tensor:
        if self.use_checkpoint:
            return checkpoint(block, tokens, use_reentrant=False)
        return block(tokens)

    def _make_block(self, **options: Any) -> nn.Module:
        return CATBlock(**options)


class AlwaysCheckpointedLayer(CATLayer):
    """The stage of the official classification and segmentation code, which ignores the option."""

    def run(self, block: nn.Module, tokens: Tensor) -> Tensor:
        # both branches, as there: by the second `patch` recognises such a layer and reports it
        if self.use_checkpoint:
            tokens = checkpoint(block, tokens, use_reentrant=False)
        else:
            tokens = checkpoint(block, tokens, use_reentrant=False)
        return tokens


class CATBlock(nn.Module):
    """The official block: the fixed-resolution variant, or the dense one for no resolution."""

    def __init__(
        self,
        dim: int,
        input_resolution: tuple[int, int] | None,
        num_heads: int,
        patch_size: int,
        mlp_ratio: float,
        qkv_bias: bool,
        qk_scale: float | None,
        drop: float,
        attn_drop: float,
        drop_path: float,
        norm_layer: Callable[[int], nn.Module],
        attn_type: str,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.patch_size = patch_size
        self.attn_type = attn_type
        if input_resolution is None:
            self.H: int | None = None
            self.W: int | None = None
        else:
            self.input_resolution = input_resolution
        self.norm1 = norm_layer(dim)
        self.attn = Attention(
            dim=dim if attn_type == "ipsa" else patch_size**2,
            patch_size=(patch_size, patch_size),
            num_heads=num_heads if attn_type == "ipsa" else 1,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop=attn_drop,
            proj_drop=drop,
            rpe=attn_type == "ipsa",
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)

    @property
    def map_size(self) -> tuple[int, int]:
        if not hasattr(self, "H"):
            return self.input_resolution
        if self.H is None or self.W is None:
            raise ValueError("the block needs the size of its map: set H and W before the call")
        return self.H, self.W

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, H*W, C) -> the same."""
        height, width = self.map_size
        batch, tokens, channels = x.shape
        if tokens != height * width:
            raise ValueError(f"the block needs {height} x {width} tokens, got {tokens}")
        shortcut = x
        x = self.norm1(x).view(batch, height, width, channels)
        bottom, right = -height % self.patch_size, -width % self.patch_size
        if (bottom or right) and not hasattr(self, "H"):
            raise ValueError(f"N={self.patch_size} does not divide the {height} x {width} map")
        x = F.pad(x, (0, 0, 0, right, 0, bottom))

        attend = attend_within if self.attn_type == "ipsa" else attend_across
        x = attend(self.attn, x, self.patch_size)[:, :height, :width]
        x = x.reshape(batch, tokens, channels)
        x = shortcut + self.drop_path(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Attention(nn.Module):
    """The attention of both kinds of block, on partitioned tokens (sequences, tokens, dim)."""

    relative_position_index: Tensor

    def __init__(
        self,
        dim: int,
        patch_size: tuple[int, int],
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        rpe: bool = True,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.patch_size = patch_size
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.rpe = rpe
        if rpe:
            rows = (2 * patch_size[0] - 1) ** 2
            self.relative_position_bias_table = nn.Parameter(torch.empty(rows, num_heads))
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
            index = relative_position_index(patch_size[0])
            self.register_buffer("relative_position_index", index)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_drop(self.proj(self.attend(self.qkv(x))))

    def attend(self, qkv: Tensor) -> Tensor:
        """Queries, keys and values (sequences, tokens, 3 dim) -> (sequences, tokens, dim)."""
        sequences, tokens, _ = qkv.shape
        heads = qkv.reshape(sequences, tokens, 3, self.num_heads, self.dim // self.num_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        if self.rpe:
            bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
            attn = attn + bias.view(tokens, tokens, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        attn = self.attn_drop(self.softmax(attn))
        return (attn @ v).transpose(1, 2).reshape(sequences, tokens, self.dim)


def attend_within(attn: nn.Module, x: Tensor, patch_size: int) -> Tensor:
    """IPSA of a map (B, H, W, C) that N divides, by what takes (B * windows, N*N, C)."""
    return reverse(attn(partition(x, patch_size)), patch_size, x.shape)


def attend_across(attn: nn.Module, x: Tensor, patch_size: int) -> Tensor:
    """CPSA of a map (B, H, W, C) that N divides, by what takes (B * C, P, N*N)."""
    batch, height, width, channels = x.shape
    pixels = patch_size**2
    patches = height * width // pixels
    x_patches = partition(x, patch_size).view(batch, patches, pixels, channels)
    x_patches = x_patches.permute(0, 3, 1, 2).contiguous().view(-1, patches, pixels)
    x_patches = attn(x_patches).view(batch, channels, patches, pixels)
    x_patches = x_patches.permute(0, 2, 3, 1).contiguous()
    return reverse(x_patches, patch_size, x.shape)


def partition(x: Tensor, patch_size: int) -> Tensor:
    """(B, H, W, C) -> (B * windows, N*N, C), one copy."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // patch_size, patch_size, width // patch_size, patch_size, channels)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, patch_size**2, channels)


def reverse(windows: Tensor, patch_size: int, shape: torch.Size) -> Tensor:
    """The inverse of `partition` into a map of this shape, one copy."""
    batch, height, width, channels = shape
    rows, columns = height // patch_size, width // patch_size
    x = windows.view(batch, rows, columns, patch_size, patch_size, channels)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(shape)
