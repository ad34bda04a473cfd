"""The same call gives the same bits, launch after launch, forward and backward."""

from __future__ import annotations

import pytest
import torch

import catkernels
from catkernels.block_cases import MLPCase, ProjectionCase
from catkernels.cases import Shape, cat_stages, make_cpsa_inputs, make_ipsa_inputs
from catkernels.torch_state.device import best_device, interpreting

pytest.importorskip("triton")

DEVICE = best_device()
FEW_WINDOWS = [
    Shape("few-windows", batch=2, height=14, width=7, channels=32, num_heads=1),
    Shape("few-padded-windows", batch=1, height=9, width=8, channels=32, num_heads=1),
]
MANY_WINDOWS = [
    pytest.param(shape, id=str(shape), marks=pytest.mark.skipif(interpreting(), reason="no GPU"))
    for shape in (*cat_stages("small", batch=32), cat_stages("small", (333, 500), batch=2)[0])
]


def ipsa(shape: Shape, dtype: torch.dtype):
    """The function, its tensors and its options."""
    inputs = make_ipsa_inputs(shape, dtype, DEVICE)
    options = {"num_heads": shape.num_heads, "patch_size": shape.patch_size}
    return catkernels.ipsa_attention, inputs, options


def cpsa(shape: Shape, dtype: torch.dtype):
    return catkernels.cpsa_attention, make_cpsa_inputs(shape, dtype, DEVICE), {"patch_size": 7}


def mlp(shape: Shape, dtype: torch.dtype):
    """The MLP of a block, its first image's branch dropped."""
    return rows(MLPCase, shape, dtype)


def projections(shape: Shape, dtype: torch.dtype):
    """IPSA's linear layers with norm and residual."""
    return rows(ProjectionCase, shape, dtype)


def rows(kind: type[MLPCase | ProjectionCase], shape: Shape, dtype: torch.dtype):
    case = kind(shape.name, shape.batch, shape.height, shape.width, shape.channels, drop_path=0.2)
    if reasons := case.unsupported_reasons(DEVICE, dtype, needs_grad=True):
        pytest.skip("; ".join(reasons))

    def attend(*, backend, **inputs):
        return case.attend(*inputs.values())

    return attend, case.inputs(dtype, DEVICE), {}


@pytest.mark.parametrize("make", [ipsa, cpsa, mlp, projections])
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)],
    ids=str,
)
@pytest.mark.parametrize("shape", [*FEW_WINDOWS, *MANY_WINDOWS], ids=str)
def test_same_bits_launch_after_launch(make, shape, dtype, full, request):
    if make is cpsa:
        request.getfixturevalue("tf32_on_gpus")
    attention, inputs, options = make(shape, dtype)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}

    def run() -> list[torch.Tensor]:
        output = attention(**leaves, **options, backend="triton")
        grad = torch.linspace(-1, 1, output.numel(), device=DEVICE, dtype=dtype).view_as(output)
        grads = torch.autograd.grad(output, list(leaves.values()), grad, allow_unused=True)
        # the bias of padded pixels is in no result where nothing is padded
        return [output, *(grad for grad in grads if grad is not None)]

    first = run()
    for _ in range(1 if interpreting() else 1000 if full else 20):
        again = run()
        assert all(map(torch.equal, first, again))
