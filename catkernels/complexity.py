"""Multiply-accumulates of CAT: the paper's formulas beside what PyTorch counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from catkernels import official, reference
from catkernels.cat import CAT


@dataclass(frozen=True)
class StageMacs:
    """MACs of one attention layer in a stage, for one image (paper, section 3.2).

    Attributes:
        height, width, channels: the stage's map, padded to multiples of N.
        msa: by formula, what global multi-head self-attention would take.
        ipsa, cpsa: by formula.
        ipsa_counted, cpsa_counted: as PyTorch counts the official order of operations.
    """

    height: int
    width: int
    channels: int
    msa: int
    ipsa: int
    cpsa: int
    ipsa_counted: int
    cpsa_counted: int


def msa_macs(height: int, width: int, channels: int) -> int:
    """Global multi-head self-attention: ``4 hw C^2 + 2 (hw)^2 C``."""
    pixels = height * width
    return 4 * pixels * channels**2 + 2 * pixels**2 * channels


def ipsa_macs(height: int, width: int, channels: int, patch_size: int) -> int:
    """Inner-patch self-attention: ``4 hw C^2 + 2 N^2 hw C``."""
    pixels = height * width
    return 4 * pixels * channels**2 + 2 * patch_size**2 * pixels * channels


def cpsa_macs(height: int, width: int, channels: int, patch_size: int) -> int:
    """Cross-patch self-attention: ``4 N^2 hw C + 2 (hw / N)^2 C``."""
    pixels = height * width
    return 4 * patch_size**2 * pixels * channels + 2 * (pixels // patch_size) ** 2 * channels


def stage_macs(model: CAT, image_size: int | tuple[int, int] = 224) -> list[StageMacs]:
    """The formulas beside the counts for each stage of a model at an image size."""
    height, width = (image_size,) * 2 if isinstance(image_size, int) else image_size
    patch = model.patch_embed.patch_emb_size
    height, width = reference.ceil_div(height, patch[0]), reference.ceil_div(width, patch[1])
    rows = []
    for layer in model.layers:
        block: Any = layer.get_submodule("pre_ipsa_blocks.0")
        side, heads, channels = block.patch_size, block.attn.num_heads, block.attn.dim
        size = (height + -height % side, width + -width % side)
        shape = (*size, channels)
        windows = reference.to_windows(torch.empty(1, *shape, device="meta"), side)[0]
        patches = reference.to_patches(torch.empty(1, *shape, device="meta"), side)[0]
        with torch.device("meta"):
            ipsa = official.Attention(channels, (side, side), heads)
            cpsa = official.Attention(side**2, (side, side), 1, rpe=False)
        rows.append(
            StageMacs(
                *shape,
                msa=msa_macs(*shape),
                ipsa=ipsa_macs(*shape, side),
                cpsa=cpsa_macs(*shape, side),
                ipsa_counted=count_macs(ipsa, windows),
                cpsa_counted=count_macs(cpsa, patches),
            )
        )
        height, width = reference.ceil_div(height, 2), reference.ceil_div(width, 2)
    return rows


def count_macs(module: nn.Module, *inputs: torch.Tensor) -> int:
    """What `torch.utils.flop_counter` counts in one forward call, as multiply-accumulates."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return int(counter.get_total_flops()) // 2
