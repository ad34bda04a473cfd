"""CAT among timm's models: import this module, then ``timm.create_model("cat_small")``.

timm knows a model of another package once the module that defines it has been imported. Nothing
else here imports this one, and it is not called ``timm``, so that no ``import timm`` finds it.

``features_only=True`` gives the classifier's own maps, where our backbone norms each. No weights
are hosted: ``checkpoint_path=`` loads a classifier's, ``load_checkpoint(features.model, path)``
those of ``features``. timm asks for a torchvision that fits torch, 0.29 for 2.14. `torch.fx` traces
around the blocks; TorchScript, which PyTorch has deprecated, takes none of our models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from catkernels import cat
from catkernels.block import CATBlock
from catkernels.layers import PatchEmbedding, PatchProjection, add_position_embedding

try:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.layers import SelectAdaptivePool2d
    from timm.models import (
        build_model_with_cfg,
        generate_default_cfgs,
        register_model,
        register_notrace_function,
        register_notrace_module,
    )
except ImportError as error:
    raise ImportError(
        f"CAT among timm's models needs timm ({error}): pip install 'catkernels[timm]'"
    ) from error
except (RuntimeError, AttributeError) as error:
    # what timm's torchvision fails with, made for another torch: at first, and once it was tried
    if "torchvision" not in str(error):
        raise
    major, minor = torch.__version__.split(".")[:2]
    wanted = f"0.{int(minor) + 15}" if major == "2" else "made for it"
    raise ImportError(
        f"timm needs a torchvision that fits torch {torch.__version__}, which is torchvision "
        f"{wanted}; that here does not ({error}): install it, from where torch came from"
    ) from error

__all__ = ["CAT", "cat_base", "cat_small", "cat_tiny"]

# What `torch.fx` must call and not trace, since it asks for the sizes of a map.
for module in (CATBlock, PatchEmbedding, PatchProjection):
    register_notrace_module(module)
register_notrace_function(add_position_embedding)

# The official evaluation: the shorter side to 256 pixels, of which the middle 224 x 224 are seen.
# There is no source of weights: none are hosted in the present layout of the official code.
default_cfgs = generate_default_cfgs(
    {
        variant: {
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 224 / 256,
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "origin_url": "https://github.com/linhezheng19/CAT",
            "paper_name": "CAT: Cross Attention in Vision Transformer",
            "paper_ids": "arXiv:2106.05786",
        }
        for variant in cat.VARIANTS
    }
)


# `register_model`, with its type
_register: Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]] = register_model


class CAT(cat.CAT):
    """`catkernels.CAT`, the classifier, with the methods and attributes of timm's models.

    Images of any size are taken. The parameters have the same names, so that timm loads weights of
    either, and so does `catkernels.load_checkpoint`, which converts between sizes. What
    ``features_only=True`` builds keeps this model as its ``model``.

    Args:
        num_classes: width of the classifier; 0 leaves it out.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for maps.
        drop_rate: dropout before the classifier.
        proj_drop_rate: what `catkernels.CAT` calls ``drop_rate``.
        device, dtype: of the parameters; None: PyTorch's defaults.
        options: the other arguments of `catkernels.CAT`, except ``out_indices``.
    """

    # the layout of `forward_features`, as timm's Swin has it
    output_fmt = "NHWC"

    def __init__(
        self,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        with nullcontext() if device is None else torch.device(device):
            super().__init__(num_classes=0, drop_rate=proj_drop_rate, **options)
        self.to(dtype=dtype)
        self.in_chans = self.patch_embed.in_chans
        stride = max(self.patch_embed.patch_emb_size)
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": channels, "reduction": stride << stage, "module": f"layers.{stage}"}
            for stage, channels in enumerate(self.num_features)
        ]
        # to timm it is the last stage's alone
        self.num_features = self.num_features[-1]  # type: ignore[assignment]
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> the normed map (B, H/32, W/32, num_features)."""
        *_, x = self.stage_maps(images)
        normed: Tensor = self.norm(x)
        return normed

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """A map (B, H, W, num_features) -> logits, or pooled features (B, head_hidden_size)."""
        x = self.head_drop(self.global_pool(x))
        output: Tensor = x if pre_logits else self.head(x)
        return output

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier, and pooling unless it is None, in the place of the present one.

        Raises:
            ValueError: ``num_classes`` is negative.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes must be at least 0, got {num_classes}")
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(
                pool_type=global_pool, flatten=bool(global_pool), input_fmt=self.output_fmt
            )
        self.num_classes = num_classes
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.head = nn.Identity()
        if num_classes:
            like = self.patch_embed.proj.weight
            self.head = nn.Linear(
                self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype
            )
            cat.init_weights(self.head)
        # new modules are in training mode, whatever the model is in
        for module in (self.global_pool, self.head):
            module.train(self.training)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of stages, as the classifier's trunk has them: without the norms of a backbone.

        Args:
            images: (B, in_chans, H, W).
            indices: the stages, in the order wanted; so many last ones; or None for all.
            norm: apply the final norm to the last stage's map, the only one it fits.
            stop_early: leave the stages after the last wanted one out.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return the list of maps alone.

        Returns:
            The map (B, H, W, C) that the last stage run ends with, and the maps asked for.

        Raises:
            ValueError: there is no such stage or format.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        stages = self._stages(indices)
        count = max(stages) + 1 if stop_early else len(self.layers)
        maps = list(islice(self.stage_maps(images), count))
        final = self.norm(maps[-1]) if count == len(self.layers) else maps[-1]
        if norm:
            maps[-1] = final
        wanted = [maps[stage] for stage in stages]
        if output_fmt == "NCHW":
            wanted = [x.permute(0, 3, 1, 2).contiguous() for x in wanted]
        return wanted if intermediates_only else (final, wanted)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] | None = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what `forward_intermediates` of these stages does not need, and number them.

        The norm and the head also go where the last stage does, whose channels they fit.
        """
        stages = self._stages(indices)
        ends_early = max(stages) < len(self.layers) - 1
        self.layers = self.layers[: max(stages) + 1]
        # nothing would use it, nor give its parameters a gradient
        cast("cat.CATLayer", self.layers[-1]).downsample = None
        self.num_features = self.feature_info[max(stages)]["num_chs"]
        if prune_norm or ends_early:
            self.norm = nn.Identity()
        if prune_head or ends_early:
            self.reset_classifier(0, "")
        return stages

    def _stages(self, indices: int | Sequence[int] | None) -> list[int]:
        """The stages that timm's kind of index means, numbered from 0."""
        count = len(self.layers)
        if indices is None:
            indices = count
        wanted = range(-indices, 0) if isinstance(indices, int) else indices
        if not wanted or not set(wanted) <= set(range(-count, count)):
            raise ValueError(
                f"indices must be stages {-count} .. {count - 1}, or 1 .. {count} for so many "
                f"last ones, got {indices}"
            )
        return [stage % count for stage in wanted]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass, or no longer."""
        for layer in self.layers:
            cast("cat.CATLayer", layer).use_checkpoint = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """What timm groups parameters by, for learning rates by depth: single CABs, or stages."""
        joined = (99999,)  # to the group before, in timm's words
        single_cabs = [
            (r"^layers\.(\d+)\.downsample", joined),
            (r"^layers\.(\d+)\.\w+\.(\d+)", None),
            (r"^norm", joined),
        ]
        return {
            "stem": r"^ape|^patch_embed",
            "blocks": r"^layers\.(\d+)" if coarse else single_cabs,
        }


@_register
def cat_tiny(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """CAT-T, as `catkernels.cat_tiny`."""
    return _create("cat_tiny", pretrained, **overrides)


@_register
def cat_small(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """CAT-S, as `catkernels.cat_small`."""
    return _create("cat_small", pretrained, **overrides)


@_register
def cat_base(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """CAT-B, as `catkernels.cat_base`."""
    return _create("cat_base", pretrained, **overrides)


def _create(variant: str, pretrained: bool, **overrides: Any) -> nn.Module:
    options: dict[str, Any] = {**cat.VARIANTS[variant], **overrides}
    stages = tuple(range(len(options["depths"])))
    features = {"out_indices": options.pop("out_indices", stages), "feature_cls": "getter"}
    try:
        model: nn.Module = build_model_with_cfg(
            CAT, variant, pretrained, feature_cfg=features, **options
        )
    except RuntimeError as error:
        if not pretrained or "No pretrained weights" not in str(error):
            raise
        raise RuntimeError(
            f"no weights of {variant} are hosted: leave pretrained out and give your own by "
            "checkpoint_path=, or to the model by catkernels.load_checkpoint"
        ) from error
    return model
