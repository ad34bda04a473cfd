"""Half a block, by our operators and in the official order, in every mode of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from catkernels import CATBlock
from catkernels.accuracy import assert_within_error_budget
from catkernels.torch_state.precision import compute_dtype

# What of half a block is computed: (its modules, x) -> a tensor, or several.
Call = Callable[[nn.ModuleDict, Tensor], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Mode:
    """In which dtypes half a block computes."""

    name: str
    stream: torch.dtype  # of x and the parameters
    autocast: torch.dtype | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def products(self) -> torch.dtype:
        return self.autocast or self.stream


FLOAT32 = Mode("float32", torch.float32)
BFLOAT16 = Mode("bfloat16", torch.bfloat16)
FLOAT16 = Mode("float16", torch.float16)
AUTOCAST = Mode("autocast", torch.float32, torch.bfloat16)
AUTOCAST_FLOAT16 = Mode("autocast-float16", torch.float32, torch.float16)
MODES = [FLOAT32, BFLOAT16, AUTOCAST]
MORE_MODES = [FLOAT16, AUTOCAST_FLOAT16]

# DropPath's, of each image: the first one's branch is dropped.
FACTORS = torch.tensor([0.0, 1.25, 1.25])


def sampled(plain: list, more: list) -> list:
    """Parameters of a test: those of a plain run, and more of them for a full one."""
    return [*plain, *(pytest.param(value, marks=pytest.mark.full) for value in more)]


def half_block(channels: int, hidden: int = 0, seed: int = 0) -> nn.ModuleDict:
    """A norm over C and linear layers, whose parameters are all of a size that matters."""
    hidden = hidden or 4 * channels
    modules = nn.ModuleDict(
        {
            "norm": nn.LayerNorm(channels),
            "fc1": nn.Linear(channels, hidden),
            "fc2": nn.Linear(hidden, channels),
        }
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in modules.named_parameters():
            parameter.normal_(generator=generator)
            if name == "norm.weight":
                parameter.mul_(0.2).add_(1)
            elif parameter.dim() == 1:
                parameter.mul_(0.3)
            else:
                parameter.mul_(1.5 * parameter.shape[1] ** -0.5)
    return modules


def without(name: str) -> Callable[[nn.ModuleDict], None]:
    """A change that takes a parameter away from half a block."""

    def change(modules: nn.ModuleDict) -> None:
        layer, parameter = name.split(".")
        modules[layer].register_parameter(parameter, None)

    return change


def factors(x: Tensor) -> Tensor:
    """`FACTORS` for the images of ``x``, in the dtype of a branch."""
    return FACTORS[: len(x)].to(x.device, compute_dtype(x))


def seeded(block: CATBlock, x: Tensor) -> Tensor:
    """The block, which drops the same branches in every call."""
    torch.manual_seed(3)
    return block(x)


def by_pytorch(block: CATBlock, x: Tensor) -> Tensor:
    """The same by the block's children, in the official order."""
    backend, block.backend = block.backend, "reference"
    try:
        return seeded(block, x)
    finally:
        block.backend = backend


def rows(*sizes: int, seed: int = 1) -> Tensor:
    """Rows of a residual stream, whose mean is not zero; float32."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)) + 0.3


def results(call: Call, modules: nn.ModuleDict, x: Tensor, mode: Mode) -> dict[str, Tensor]:
    """Outputs, and the gradients of x and of the parameters that want one, by name."""
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, mode.autocast, enabled=mode.autocast is not None):
        outputs = call(modules, x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    named = {f"output {i}": output for i, output in enumerate(outputs)}
    leaves = {"x": x} | {n: p for n, p in modules.named_parameters() if p.requires_grad}
    cotangents = [
        rows(*output.shape, seed=2 + i).bfloat16().to(output) for i, output in enumerate(outputs)
    ]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        if gradient is not None:
            assert gradient.dtype == leaf.dtype, name
            named[f"gradient of {name}"] = gradient
    return {name: tensor.detach() for name, tensor in named.items()}


def compared(
    ours: Call, official: Call, modules: nn.ModuleDict, x: Tensor, mode: Mode
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """By name: our result, the official one in the same mode, and the true one."""
    modules, x = deepcopy(modules).to(x.device, mode.stream), x.to(mode.stream)
    exact = Mode("float64", torch.float64)
    actual = results(ours, modules, x, mode)
    same = results(official, modules, x, mode)
    truth = results(official, deepcopy(modules).double(), x.double(), exact)
    assert actual.keys() == same.keys() == truth.keys()
    for name in truth:
        yield name, actual[name], same[name], truth[name]


def assert_right(ours: Call, official: Call, modules: nn.ModuleDict, x: Tensor, mode: Mode) -> None:
    """All results are within the error budget, and of the official dtypes."""
    for name, actual, same, truth in compared(ours, official, modules, x, mode):
        assert actual.dtype == same.dtype, f"{name}: {actual.dtype}, not {same.dtype}"
        assert_within_error_budget(actual, same, truth, f"{mode}: {name}")


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Rounded in other places, but nothing left out."""
    for name, tensor in actual.items():
        difference = (tensor - expected[name]).double().norm()
        assert difference <= 0.03 * expected[name].double().norm() + 1e-3, name
