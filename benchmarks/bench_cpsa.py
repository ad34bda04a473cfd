"""CPSA of a map, both its linear layers included, by every provider."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.nn.functional as F
from torch import Tensor

import catkernels
from benchmarks import harness, operation
from benchmarks.roofline import cpsa_backward_work, cpsa_forward_work
from catkernels import official
from catkernels.arguments import Backend
from catkernels.cases import Shape, make_cpsa_inputs
from catkernels.reference import from_patches, pad_to_patches, to_patches

Inputs = dict[str, Tensor]


def official_provider(shape: Shape, inputs: Inputs) -> Callable[[], Tensor]:
    """The official order of operations."""
    x, side = inputs["x"], shape.patch_size
    module = official.Attention(side**2, (side, side), num_heads=1, rpe=False).to(x)
    for layer in ("qkv", "proj"):
        for name in ("weight", "bias"):
            setattr(getattr(module, layer), name, inputs[f"{layer}_{name}"])

    def attend() -> Tensor:
        output = official.attend_across(module, pad_to_patches(x, side), side)
        return output[:, : shape.height, : shape.width]

    return attend


def compiled_provider(shape: Shape, inputs: Inputs) -> Callable[[], Tensor]:
    """The official order of operations through `torch.compile`."""
    return harness.compiled(official_provider(shape, inputs))


def sdpa_provider(shape: Shape, inputs: Inputs) -> Callable[[], Tensor]:
    """Patches through `torch.nn.functional.scaled_dot_product_attention`, all channels at once."""
    side = shape.patch_size

    def attend() -> Tensor:
        padded = pad_to_patches(inputs["x"], side)
        tokens = to_patches(padded, side)  # (B, C, P, N*N)
        qkv = F.linear(tokens, inputs["qkv_weight"], inputs["qkv_bias"])
        output = F.scaled_dot_product_attention(*qkv.chunk(3, -1))
        output = F.linear(output, inputs["proj_weight"], inputs["proj_bias"])
        output = from_patches(output, side, *padded.shape[1:3])
        return output[:, : shape.height, : shape.width]

    return attend


def catkernels_provider(
    shape: Shape, inputs: Inputs, backend: Backend = "auto"
) -> Callable[[], Tensor]:
    """This package, by whatever serves on the device."""
    return lambda: catkernels.cpsa_attention(**inputs, patch_size=shape.patch_size, backend=backend)


def served_by(shape: Shape, inputs: Inputs) -> str:
    reasons = catkernels.unsupported_reasons(
        catkernels.cpsa_attention, **inputs, patch_size=shape.patch_size
    )
    return operation.serving(reasons)


CPSA = operation.Operation(
    name="cpsa",
    make_inputs=make_cpsa_inputs,
    providers={
        "official": official_provider,
        "compiled": compiled_provider,
        "sdpa": sdpa_provider,
        "catkernels": catkernels_provider,
    },
    served_by=served_by,
    forward_work=cpsa_forward_work,
    backward_work=cpsa_backward_work,
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    operation.parametrize(metafunc, CPSA)


def test_cpsa(benchmark, case: operation.Case, provider: str):
    operation.run(benchmark, CPSA, case, provider)
