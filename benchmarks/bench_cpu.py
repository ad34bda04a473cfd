"""Inference on one CPU thread: both attentions against the official order of operations.

Both run in turn, round by round, since a machine's speed drifts. The ratio is that of the fastest
rounds; the official operations are timed against themselves as well, and where the two disagree by
more than a tenth the machine was too noisy for the ratio to mean anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import catkernels
from catkernels import official
from catkernels.testing import (
    Shape,
    assert_within_error_budget,
    cat_stages,
    make_cpsa_inputs,
    make_ipsa_inputs,
)

ROUNDS = 15
SHAPES = [shape for batch in (1, 8, 16) for shape in cat_stages("small", batch=batch)]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


def ipsa_pair(shape: Shape, dtype: torch.dtype) -> tuple[Callable, Callable]:
    """IPSA of a map of queries, keys and values: ours, and as the official code computes it."""
    inputs = {name: tensor.to(dtype) for name, tensor in make_ipsa_inputs(shape).items()}
    qkv, side = inputs["qkv"], shape.patch_size
    attention = official.Attention(shape.channels, (side, side), shape.num_heads).to(dtype)
    attention.relative_position_bias_table.data = inputs["bias_table"]

    def ours() -> Tensor:
        table = attention.relative_position_bias_table
        return catkernels.ipsa_attention(qkv, table, num_heads=shape.num_heads, patch_size=side)

    def theirs() -> Tensor:
        output = attention.attend(official.partition(qkv, side))
        return official.reverse(output, side, (*qkv.shape[:3], shape.channels))

    return ours, theirs


def cpsa_pair(shape: Shape, dtype: torch.dtype) -> tuple[Callable, Callable]:
    """CPSA of a map, both linear layers included: ours, and as the official code computes it."""
    inputs = {name: tensor.to(dtype) for name, tensor in make_cpsa_inputs(shape).items()}
    x, side = inputs["x"], shape.patch_size
    attention = official.Attention(side**2, (side, side), num_heads=1, rpe=False).to(dtype)
    for name, parameter in attention.named_parameters():
        parameter.data = inputs[name.replace(".", "_")]
    block = SimpleNamespace(attn=attention, patch_size=side)

    def ours() -> Tensor:
        return catkernels.cpsa_attention(**inputs, patch_size=side)

    def theirs() -> Tensor:
        return official.CATBlock.attend_across(block, x)

    return ours, theirs


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("attention", ["ipsa", "cpsa"])
def test_inference(benchmark, report_ratio, attention, shape):
    make_pair = {"ipsa": ipsa_pair, "cpsa": cpsa_pair}[attention]
    ours, theirs = make_pair(shape, torch.float32)
    assert_within_error_budget(ours(), theirs(), make_pair(shape, torch.float64)[1]())

    official_s: list[float] = []
    official_again_s: list[float] = []

    def time_the_official_operations() -> None:
        for times in (official_s, official_again_s):
            start = time.perf_counter()
            theirs()
            times.append(time.perf_counter() - start)

    benchmark.group = f"{attention} inference, one CPU thread"
    benchmark.pedantic(ours, setup=time_the_official_operations, rounds=ROUNDS)
    if benchmark.disabled:
        return
    ratio = min(official_s) / benchmark.stats.stats.min
    noise = min(official_s) / min(official_again_s)
    benchmark.extra_info.update(
        official_ms=min(official_s) * 1e3, speedup=ratio, official_against_itself=noise
    )
    verdict = "" if 0.9 <= noise <= 1.1 else "  void: too noisy"
    report_ratio(f"{attention} {shape.name:26} {ratio:5.2f}x  (noise {noise:4.2f}x){verdict}")
