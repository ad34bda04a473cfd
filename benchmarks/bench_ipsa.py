"""IPSA of a map of queries, keys and values, by every provider.

FlexAttention is a peer since its score function can add a position bias. NATTEN is none: its fused
kernels take no bias, so they compute something else.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import catkernels
from benchmarks import harness, operation
from benchmarks.clock import DEVICE
from benchmarks.roofline import ipsa_backward_work, ipsa_forward_work
from catkernels import official
from catkernels.arguments import Backend
from catkernels.cases import Shape, make_ipsa_inputs
from catkernels.reference import pad_to_patches, relative_position_bias

Inputs = dict[str, Tensor]


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    inputs = make_ipsa_inputs(shape, dtype, device)
    return {name: inputs[name] for name in ("qkv", "bias_table")}


def official_provider(shape: Shape, inputs: Inputs) -> Callable[[], Tensor]:
    """The official order of operations."""
    qkv, side = inputs["qkv"], shape.patch_size
    module = official.Attention(shape.channels, (side, side), shape.num_heads).to(qkv)
    module.relative_position_bias_table = inputs["bias_table"]
    return lambda: _in_windows(qkv, shape, module.attend)


def compiled_provider(shape: Shape, inputs: Inputs) -> Callable[[], Tensor]:
    """The official order of operations through `torch.compile`."""
    return harness.compiled(official_provider(shape, inputs))


def sdpa_provider(shape: Shape, inputs: Inputs) -> Callable[[], Tensor]:
    """Windows through `torch.nn.functional.scaled_dot_product_attention`, the bias as its mask."""

    def attend(qkv: Tensor) -> Tensor:
        bias = relative_position_bias(inputs["bias_table"], shape.patch_size)
        query, key, value = _heads(qkv, shape)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias[None])
        return output.transpose(1, 2).flatten(2)

    return lambda: _in_windows(inputs["qkv"], shape, attend)


def flex_provider(shape: Shape, inputs: Inputs) -> Callable[[], Tensor]:
    """Windows through FlexAttention, the bias added by its score function."""
    if DEVICE.type == "cpu":
        raise NotImplementedError("its backward pass is for GPUs")
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(qkv: Tensor) -> Tensor:
        bias = relative_position_bias(inputs["bias_table"], shape.patch_size)

        def add_bias(score, window, head, row, column):
            return score + bias[head, row, column]

        query, key, value = (heads.contiguous() for heads in _heads(qkv, shape))
        return compiled(query, key, value, score_mod=add_bias).transpose(1, 2).flatten(2)

    return lambda: _in_windows(inputs["qkv"], shape, attend)


def catkernels_provider(
    shape: Shape, inputs: Inputs, backend: Backend = "auto"
) -> Callable[[], Tensor]:
    """This package, by whatever serves on the device."""
    return lambda: catkernels.ipsa_attention(
        inputs["qkv"],
        inputs["bias_table"],
        num_heads=shape.num_heads,
        patch_size=shape.patch_size,
        backend=backend,
    )


def _in_windows(qkv: Tensor, shape: Shape, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """``attend`` (windows, N*N, 3C) -> (windows, N*N, C) on the windows of a map (B, H, W, 3C)."""
    padded = pad_to_patches(qkv, shape.patch_size)
    windows = attend(official.partition(padded, shape.patch_size))
    output = official.reverse(windows, shape.patch_size, (*padded.shape[:3], shape.channels))
    return output[:, : shape.height, : shape.width]


def _heads(qkv: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """(windows, N*N, 3C) as queries, keys and values, each (windows, heads, N*N, head_dim)."""
    heads = qkv.unflatten(-1, (3, shape.num_heads, -1))
    return heads.permute(2, 0, 3, 1, 4).unbind()


def served_by(shape: Shape, inputs: Inputs) -> str:
    reasons = catkernels.unsupported_reasons(
        catkernels.ipsa_attention,
        inputs["qkv"],
        inputs["bias_table"],
        num_heads=shape.num_heads,
        patch_size=shape.patch_size,
    )
    return operation.serving(reasons)


IPSA = operation.Operation(
    name="ipsa",
    make_inputs=make_inputs,
    providers={
        "official": official_provider,
        "compiled": compiled_provider,
        "sdpa": sdpa_provider,
        "flex": flex_provider,
        "catkernels": catkernels_provider,
    },
    served_by=served_by,
    forward_work=ipsa_forward_work,
    backward_work=ipsa_backward_work,
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    operation.parametrize(metafunc, IPSA)


def test_ipsa(benchmark, case: operation.Case, provider: str):
    operation.run(benchmark, IPSA, case, provider)
