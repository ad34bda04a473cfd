"""CAT, the Cross Attention Vision Transformer: classifier and backbone for dense tasks.

Source: "CAT: Cross Attention in Vision Transformer" (arXiv 2106.05786), section 3.3 and table 1.
Parameters have the names of the official implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from catkernels.arguments import Backend, check_backend, check_patch_size, check_probability
from catkernels.block import CATBlock
from catkernels.layers import (
    PatchEmbedding,
    PatchProjection,
    PatchSliceEmbedding,
    add_position_embedding,
)
from catkernels.reference import ceil_div, to_map

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CATOptions(TypedDict, total=False):
    """The arguments of `CAT`, for type checkers and editors of the functions that pass them on."""

    img_size: int | tuple[int, int]
    patch_emb_size: int | tuple[int, int]
    in_chans: int
    num_classes: int
    embed_dim: int
    depths: Sequence[int]
    num_heads: Sequence[int]
    patch_size: int | tuple[int, int]
    mlp_ratio: float
    qkv_bias: bool
    qk_scale: float | None
    drop_rate: float
    ipsa_attn_drop: float
    cpsa_attn_drop: float
    drop_path_rate: float
    norm_layer: Callable[[int], nn.Module]
    ape: bool
    patch_norm: bool
    slice_emb: bool
    use_checkpoint: bool
    out_indices: Sequence[int] | None
    backend: Backend


# The paper's models (table 1 and the official configurations), as arguments of `CAT`.
VARIANTS: dict[str, CATOptions] = {
    "cat_tiny": {
        "embed_dim": 64,
        "depths": (1, 1, 3, 1),
        "num_heads": (2, 4, 8, 16),
        "drop_path_rate": 0.1,
        "ape": True,
    },
    "cat_small": {
        "embed_dim": 96,
        "depths": (1, 1, 3, 1),
        "num_heads": (3, 6, 12, 24),
        "drop_path_rate": 0.2,
        "ape": True,
    },
    "cat_base": {
        "embed_dim": 96,
        "depths": (1, 1, 6, 1),
        "num_heads": (3, 6, 12, 24),
        "drop_path_rate": 0.3,
        "ape": True,
    },
}


class CAT(nn.Module):
    """Four stages of Cross Attention Blocks (IPSA, CPSA, IPSA) at strides 4, 8, 16 and 32.

    With ``out_indices=None`` this is the classifier, (B, in_chans, H, W) -> (B, num_classes); with
    stages named it is the dense backbone and returns a tuple of normed maps (B, C_i, H_i, W_i).
    Both run at any H and W: images and maps are padded at the bottom and right where they must be.

    Args:
        img_size: side, or (H, W), of the images trained on. It sizes the position embedding and, in
            the classifier, shrinks N to the map of a stage that is smaller than N.
        patch_emb_size: side, or (H, W), of the patches that become tokens.
        in_chans: channels of the image.
        num_classes: width of the classifier's head; 0 leaves the head out.
        embed_dim: channels C of the first stage; each stage doubles them.
        depths: Cross Attention Blocks of each stage.
        num_heads: heads of IPSA in each stage.
        patch_size: N, the side of the patches that both attentions work with.
        mlp_ratio: hidden width of the MLPs over their input's.
        qkv_bias: whether ``qkv`` has a bias.
        qk_scale: factor on ``q k^T``; None: ``head_dim**-0.5``, for CPSA ``(N*N)**-0.5``.
        drop_rate: dropout after the embedding, the attentions and the MLPs.
        ipsa_attn_drop: dropout of IPSA's attention weights.
        cpsa_attn_drop: dropout of CPSA's attention weights.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        norm_layer: norm, called with its channels.
        ape: whether an absolute position embedding is learned.
        patch_norm: whether the embedding is normed.
        slice_emb: embed by slicing the image twice into 2 x 2 neighbours (needs patch_emb_size 4).
        use_checkpoint: recompute each block in the backward pass; saves its activations' memory.
        out_indices: stages whose maps the backbone returns, or None for the classifier.
        backend: "auto", "triton" or "reference"; see `catkernels.functional`.

    Raises:
        ValueError: the arguments contradict each other.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_emb_size: int | tuple[int, int] = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (1, 1, 3, 1),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        patch_size: int | tuple[int, int] = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        ipsa_attn_drop: float = 0.0,
        cpsa_attn_drop: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        ape: bool = False,
        patch_norm: bool = True,
        slice_emb: bool = False,
        use_checkpoint: bool = False,
        out_indices: Sequence[int] | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        stages = len(depths)
        if not stages or min(depths) < 0:
            raise ValueError(f"depths must name the blocks of at least one stage, got {depths}")
        if num_classes < 0:
            raise ValueError(f"num_classes must be at least 0, got {num_classes}")
        if len(num_heads) != stages:
            raise ValueError(
                f"depths names {stages} stages and num_heads {len(num_heads)}: give as many of each"
            )
        if isinstance(out_indices, int) or not set(out_indices or ()) <= set(range(stages)):
            raise ValueError(f"out_indices must be stages 0 .. {stages - 1}, got {out_indices}")
        self.num_classes = num_classes
        self.out_indices = None if out_indices is None else tuple(out_indices)
        self.num_features = [embed_dim << stage for stage in range(stages)]
        self.patch_size = check_patch_size(patch_size)
        (height, width), patch = _pair(img_size), _pair(patch_emb_size)

        embedding = PatchSliceEmbedding if slice_emb else PatchEmbedding
        self.patch_embed = embedding(patch, in_chans, embed_dim, norm_layer if patch_norm else None)
        # the official models floor the grid of the embedding, so their weights have this size
        self.ape_grid = rows, columns = max(1, height // patch[0]), max(1, width // patch[1])
        self.ape: nn.Parameter | None = None
        if ape:
            tokens = (1, rows * columns, embed_dim)
            shape = (1, embed_dim, rows, columns) if self.is_backbone else tokens
            self.ape = nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))
        self.pos_drop = nn.Dropout(check_probability("drop_rate", drop_rate))

        # on the CPU also where the model is built on the meta device
        last = check_probability("drop_path_rate", drop_path_rate)
        drop_paths = torch.linspace(0, last, sum(depths), device="cpu").tolist()
        rows, columns = ceil_div(height, patch[0]), ceil_div(width, patch[1])
        self.layers = nn.ModuleList()
        for stage, depth in enumerate(depths):
            resolution = ceil_div(rows, 2**stage), ceil_div(columns, 2**stage)
            self.layers.append(
                self._make_layer(
                    dim=self.num_features[stage],
                    input_resolution=resolution,
                    num_heads=num_heads[stage],
                    patch_size=(
                        self.patch_size if self.is_backbone else min(self.patch_size, *resolution)
                    ),
                    drop_path=[drop_paths.pop(0) for _ in range(depth)],
                    downsample=stage < stages - 1,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    qk_scale=qk_scale,
                    drop=drop_rate,
                    ipsa_attn_drop=ipsa_attn_drop,
                    cpsa_attn_drop=cpsa_attn_drop,
                    norm_layer=norm_layer,
                    use_checkpoint=use_checkpoint,
                    backend=check_backend(backend),
                )
            )
        if self.out_indices is None:
            self.norm = norm_layer(self.num_features[-1])
            self.head = (
                nn.Linear(self.num_features[-1], num_classes) if num_classes else nn.Identity()
            )
        else:
            for stage in self.out_indices:
                self.add_module(f"norm{stage}", norm_layer(self.num_features[stage]))
        self.apply(init_weights)

    def _make_layer(self, *, input_resolution: tuple[int, int], **options: Any) -> nn.Module:
        """A stage. Ours runs at any resolution; the official one asks for it."""
        return CATLayer(**options)

    @property
    def is_backbone(self) -> bool:
        return self.out_indices is not None

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Images (B, in_chans, H, W) -> logits (B, num_classes), or maps (B, C_i, H_i, W_i).

        Raises:
            TypeError: ``images`` are no floating-point tensor.
            ValueError: ``images`` have another shape.
        """
        if self.out_indices is None:
            return self.head(self.forward_features(images))
        outputs = []
        for stage, x in enumerate(self.stage_maps(images)):
            if stage in self.out_indices:
                normed = getattr(self, f"norm{stage}")(x)
                outputs.append(normed.permute(0, 3, 1, 2).contiguous())
        return tuple(outputs)

    def forward_features(self, images: Tensor) -> Tensor:
        """The classifier's pooled features: (B, in_chans, H, W) -> (B, C_last)."""
        *_, x = self.stage_maps(images)
        return self.norm(x).mean((1, 2))

    def stage_maps(self, images: Tensor) -> Iterator[Tensor]:
        """The output (B, H_i, W_i, C_i) of each stage in turn, before its norm."""
        x = self.patch_embed(images)
        if self.ape is not None:
            x = add_position_embedding(x, self._ape_as_map(self.ape))
        x = self.pos_drop(x)
        for layer in self.layers:
            out, x = layer(x)
            yield out

    def _ape_as_map(self, ape: Tensor) -> Tensor:
        """The absolute position embedding at the size that it has: (1, C, H, W)."""
        return ape if self.is_backbone else to_map(ape, *self.ape_grid).permute(0, 3, 1, 2)

    def no_weight_decay(self) -> set[str]:
        """Parameters that the paper's recipe does not decay, as timm's optimizers ask for them."""
        positions = {"ape", "relative_position_bias_table"}
        return {name for name, _ in self.named_parameters() if name.split(".")[-1] in positions}


class CATLayer(nn.Module):
    """One stage: ``len(drop_path)`` Cross Attention Blocks, then the patch projection."""

    pre_ipsa_blocks: nn.ModuleList
    cpsa_blocks: nn.ModuleList
    post_ipsa_blocks: nn.ModuleList

    def __init__(
        self,
        dim: int,
        num_heads: int,
        patch_size: int,
        drop_path: Sequence[float],
        downsample: bool,
        ipsa_attn_drop: float,
        cpsa_attn_drop: float,
        norm_layer: Callable[[int], nn.Module],
        use_checkpoint: bool,
        **options: Any,
    ) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        options.update(dim=dim, num_heads=num_heads, patch_size=patch_size, norm_layer=norm_layer)
        kinds = {
            "pre_ipsa_blocks": {"attn_type": "ipsa", "attn_drop": ipsa_attn_drop},
            "cpsa_blocks": {"attn_type": "cpsa", "attn_drop": cpsa_attn_drop},
            "post_ipsa_blocks": {"attn_type": "ipsa", "attn_drop": ipsa_attn_drop},
        }
        for name, kind in kinds.items():
            blocks = [self._make_block(drop_path=p, **kind, **options) for p in drop_path]
            self.add_module(name, nn.ModuleList(blocks))
        self.downsample = PatchProjection(dim, norm_layer) if downsample else None

    def _make_block(self, **options: Any) -> nn.Module:
        return CATBlock(**options)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A map (B, H, W, C) -> this stage's output (the same) and the next stage's input."""
        for blocks in zip(
            self.pre_ipsa_blocks, self.cpsa_blocks, self.post_ipsa_blocks, strict=True
        ):
            for block in blocks:
                if self.use_checkpoint and torch.is_grad_enabled():
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
        return x, x if self.downsample is None else self.downsample(x)


def cat_tiny(**overrides: Unpack[CATOptions]) -> CAT:
    """CAT-T: 16.87 M parameters, 2.8 GMAC at 224 x 224; 80.3 % top-1 on ImageNet in the paper."""
    return CAT(**(VARIANTS["cat_tiny"] | overrides))


def cat_small(**overrides: Unpack[CATOptions]) -> CAT:
    """CAT-S: 37.29 M parameters, 6.1 GMAC at 224 x 224; 81.8 % top-1 on ImageNet in the paper."""
    return CAT(**(VARIANTS["cat_small"] | overrides))


def cat_base(**overrides: Unpack[CATOptions]) -> CAT:
    """CAT-B: 51.53 M parameters, 8.9 GMAC at 224 x 224; 82.8 % top-1 on ImageNet in the paper."""
    return CAT(**(VARIANTS["cat_base"] | overrides))


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    sides = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"a size must be a side or (height, width) of at least 1, got {size}")
    return sides[0], sides[1]


def init_weights(module: nn.Module) -> None:
    """Begin a linear layer as the official code does; for `torch.nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
