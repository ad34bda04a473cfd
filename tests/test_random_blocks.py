"""Whole blocks as nobody would pick them: sizes, dtypes, biases that are absent, frozen parts."""

from __future__ import annotations

import random

import pytest
import torch
from dense_cases import (
    AUTOCAST,
    AUTOCAST_FLOAT16,
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    Mode,
    by_pytorch,
    compared,
    rows,
    sampled,
    seeded,
)
from torch import Tensor, nn

import catkernels
from catkernels.accuracy import assert_draws_within_error_budget

pytestmark = pytest.mark.usefixtures("round_to_nearest_bf16", "poisoned_memory", "tf32_on_gpus")

# C and heads: a kernel takes the MLP of the first five, another one the gradients of three of them.
CHANNELS = [(32, 2), (64, 2), (96, 3), (128, 4), (192, 6), (16, 1), (40, 1), (72, 3), (224, 4)]


def drawn(generator: random.Random, kind: str) -> tuple[catkernels.CATBlock, Tensor]:
    """A block and a map for it."""
    channels, num_heads = generator.choice(CHANNELS)
    # windows of 8 x 8, whose kernels of CPSA take the interpreter long, the attentions' tests have
    side = generator.randint(2, 7)
    height, width = (generator.randint(1, 2 * side + 1) for _ in range(2))
    torch.manual_seed(generator.randint(0, 2**31))
    block = catkernels.CATBlock(
        channels,
        num_heads,
        side,
        mlp_ratio=generator.choice([1, 2, 4, 100.5 / channels]),
        qkv_bias=generator.random() < 0.7,
        drop_path=generator.choice([0.0, 0.5]),
        attn_type=kind,
        backend="triton",
    )
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight, 1, 0.2)
        nn.init.normal_(norm.bias, 0, 0.3)
    for layer in (block.norm1, block.norm2, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
        if generator.random() < 0.1:
            layer.register_parameter("bias", None)
    frozen = generator.random() < 0.5
    for parameter in block.parameters():
        parameter.requires_grad_(not frozen or generator.random() < 0.6)
    size = (generator.randint(1, 3), height, width, channels)
    return block, rows(*size, seed=generator.randint(0, 2**31))


@pytest.mark.parametrize(
    "mode", sampled([AUTOCAST], [FLOAT32, BFLOAT16, FLOAT16, AUTOCAST_FLOAT16]), ids=str
)
@pytest.mark.parametrize("kind", ["ipsa", "cpsa"])
def test_random_blocks(kind: str, mode: Mode, device, launches, full):
    """250 of them with `--full`."""
    generator = random.Random(f"{kind} {mode}")

    def results() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        block, x = drawn(generator, kind)
        named = compared(seeded, by_pytorch, block, x.to(device), mode)
        return {name: found for name, *found in named}

    for _ in range(5 if full else 1):
        draws = (results() for _ in range(5 if full else 2))
        assert_draws_within_error_budget(draws, f"{kind}, {mode}")
