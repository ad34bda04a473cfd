"""What the benchmarks of both attentions share: sweeps, directions, the official results."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from benchmarks import harness, roofline
from benchmarks.clock import DEVICE
from benchmarks.roofline import Work
from catkernels.accuracy import tf32_products
from catkernels.cases import Shape, cat_stages

ROUNDS = 15
TRIAL_SHAPE = Shape("trial", batch=2, height=14, width=21, channels=64, num_heads=2)

# What one is bound to its inputs with: (shape, inputs) -> a callable that gives the output map.
Provider = Callable[[Shape, dict[str, Tensor]], Callable[[], Tensor]]


@dataclass(frozen=True, eq=False)
class Attention:
    """One of the two attentions, as the benchmarks see it.

    Attributes:
        name: "ipsa" or "cpsa".
        make_inputs: shape, dtype and device -> the inputs by name.
        providers: by name; "official" is what all others are judged by and compared with.
        served_by: shape and inputs -> what serves `catkernels` here.
        forward_work, backward_work: the models, of shape and bytes of a value.
    """

    name: str
    make_inputs: Callable[..., dict[str, Tensor]]
    providers: dict[str, Provider]
    served_by: Callable[[Shape, dict[str, Tensor]], str]
    forward_work: Callable[[Shape, int], Work]
    backward_work: Callable[[Shape, int], Work]

    def work(self, shape: Shape, dtype: torch.dtype, direction: str) -> Work:
        passes = {
            "forward": [self.forward_work],
            "backward": [self.backward_work],
            "step": [self.forward_work, self.backward_work],
        }[direction]
        return functools.reduce(Work.__add__, (work(shape, dtype.itemsize) for work in passes))


@dataclass(frozen=True)
class Case:
    """What is computed in one row of a sweep."""

    sweep: str
    shape: Shape
    dtype: torch.dtype
    direction: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.sweep}-{self.shape}-{dtype}-{self.direction}"


def parametrize(metafunc: pytest.Metafunc, attention: Attention) -> None:
    """Give a benchmark the rows of this device's sweep, what matters most first."""
    if metafunc.config.getoption("--trial"):
        rows = _rows(
            "trial", [TRIAL_SHAPE], "float32", "forward backward step", *attention.providers
        )
    else:
        rows = _cpu_sweep() if DEVICE.type == "cpu" else _gpu_sweep()
    served = [(case, provider) for case, provider in rows if provider in attention.providers]
    metafunc.parametrize(("case", "provider"), served, ids=str)


def _gpu_sweep() -> Iterator[tuple[Case, str]]:
    passes, main = "forward backward", ("sdpa", "catkernels")
    for batch in (256, 32, 1):
        shapes = cat_stages("small", batch=batch)
        yield from _rows("stages", shapes, "bfloat16", f"{passes} step", *main)
    shapes = cat_stages("tiny", batch=256)
    yield from _rows("stages", shapes, "bfloat16", f"{passes} step", *main)
    for dtype in ("float16", "float32"):
        yield from _rows("dtypes", cat_stages("small", batch=256), dtype, passes, *main)
    for image, batch in ((512, 8), ((800, 1344), 2), ((333, 500), 8)):
        yield from _rows(
            "image sizes", cat_stages("small", image, batch), "bfloat16", passes, *main
        )
    yield from _rows("patch sizes", _patch_sizes(batch=64), "bfloat16", passes, *main)
    shapes, peers = cat_stages("small", batch=256), ("official", "compiled", "flex")
    yield from _rows("peers", shapes, "bfloat16", passes, *peers)


def _cpu_sweep() -> Iterator[tuple[Case, str]]:
    main = ("sdpa", "catkernels")
    for batch in (1, 8, 16):
        yield from _rows("stages", cat_stages("small", batch=batch), "float32", "forward", *main)
    for image in (384, (333, 500)):
        yield from _rows("image sizes", cat_stages("small", image), "float32", "forward", *main)
    yield from _rows("patch sizes", _patch_sizes(batch=1), "float32", "forward", *main)
    first, *_ = cat_stages("small", batch=8)
    yield from _rows("stages", [first], "float32", "step", *main)
    yield from _rows("peers", [first], "float32", "forward", "official", "compiled")


def _patch_sizes(batch: int) -> list[Shape]:
    """The first stage of CAT-S at 192 x 192, which all of these but 7 divide."""
    return [
        Shape(f"N{side}-48x48-b{batch}", batch, 48, 48, 96, 3, patch_size=side)
        for side in (4, 7, 8, 12, 16)
    ]


def _rows(
    sweep: str, shapes: list[Shape], dtype: str, directions: str, *providers: str
) -> Iterator[tuple[Case, str]]:
    for shape in shapes:
        for direction in directions.split():
            for provider in providers:
                yield Case(sweep, shape, getattr(torch, dtype), direction), provider


def run(
    benchmark, attention: Attention, case: Case, provider: str, rounds: int | None = None
) -> None:
    """Judge a provider's results, then time it in turn with the official operations."""
    inputs = make_leaves(attention, case.shape, case.dtype)
    attend = _judged(attention, case, provider, inputs)
    official = attention.providers["official"](case.shape, inputs)
    benchmark.group = f"{attention.name} {case.shape} {case.dtype} {case.direction}"
    benchmark.extra_info.update(
        operation=attention.name,
        sweep=case.sweep,
        provider=provider,
        direction=case.direction,
        dtype=str(case.dtype).removeprefix("torch."),
        num_patches=case.shape.num_patches,
        **dataclasses.asdict(case.shape),
    )
    if provider == "catkernels":
        with torch.inference_mode(case.direction == "forward"):
            benchmark.extra_info["served_by"] = attention.served_by(case.shape, inputs)
    harness.race(
        benchmark,
        workload(case.direction, attend, inputs),
        workload(case.direction, official, inputs),
        rounds=rounds or ROUNDS,
        work=attention.work(case.shape, case.dtype, case.direction),
        ceilings=roofline.ceilings(case.dtype),
    )


def _judged(
    attention: Attention, case: Case, provider: str, inputs: dict[str, Tensor]
) -> Callable[[], Tensor]:
    """The provider's function of these inputs, whose results keep the error budget."""
    with_gradients = case.direction != "forward"
    with harness.admitting(provider):
        attend = attention.providers[provider](case.shape, inputs)
        contender = results(attend, inputs, with_gradients)
        official, truth = (
            official_results(attention, case.shape, case.dtype, computed_in, with_gradients)
            for computed_in in (case.dtype, torch.float64)
        )
        harness.judge(contender, official, truth)
    return attend


@functools.lru_cache(maxsize=1)
def make_leaves(
    attention: Attention,
    shape: Shape,
    dtype: torch.dtype,
    computed_in: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The inputs by name, rounded to ``dtype``, for a computation in another one if need be.

    As in a model, the map comes first and is a tensor, and everything else is a parameter.
    """
    inputs = attention.make_inputs(shape, dtype, DEVICE)
    (name, x), *parameters = (
        (name, tensor.to(computed_in or dtype)) for name, tensor in inputs.items()
    )
    return {name: x.requires_grad_()} | {name: nn.Parameter(t) for name, t in parameters}


@functools.lru_cache(maxsize=2)
def official_results(
    attention: Attention,
    shape: Shape,
    dtype: torch.dtype,
    computed_in: torch.dtype,
    with_gradients: bool,
) -> dict[str, Tensor]:
    """What the official operations make of the inputs in ``dtype``, computed in another one."""
    inputs = make_leaves.__wrapped__(attention, shape, dtype, computed_in)
    with tf32_products():
        return results(attention.providers["official"](shape, inputs), inputs, with_gradients)


def serving(reasons: list[str]) -> str:
    """What serves a call that the kernels cannot serve for these reasons."""
    on_cpu = "PyTorch on the CPU" if DEVICE.type == "cpu" else "reference"
    return f"{on_cpu}: {'; '.join(reasons)}" if reasons else "triton"


def results(
    attend: Callable[[], Tensor], inputs: dict[str, Tensor], with_gradients: bool
) -> dict[str, Tensor]:
    """The output and, where asked for, the gradients of all inputs, by name."""
    if not with_gradients:
        with torch.inference_mode():
            return {"output": attend()}
    output = attend()
    gradients = torch.autograd.grad(output, list(inputs.values()), cotangent(output))
    names = [f"gradient of {name}" for name in inputs]
    return {"output": output.detach(), **dict(zip(names, gradients, strict=True))}


def workload(
    direction: str, attend: Callable[[], Tensor], inputs: dict[str, Tensor]
) -> Callable[[], object]:
    """What is timed: the forward pass in inference mode, the backward pass alone, or both."""
    leaves = list(inputs.values())
    if direction == "forward":
        return torch.inference_mode()(attend)
    output = attend()
    grad = cotangent(output)
    if direction == "backward":
        return lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True)
    return lambda: torch.autograd.grad(attend(), leaves, grad)


def cotangent(output: Tensor) -> Tensor:
    """A gradient of the output, the same in every dtype: rounded to bfloat16, the coarsest."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    grad = torch.randn(output.shape, dtype=torch.float32, device=DEVICE, generator=generator)
    return grad.bfloat16().to(output.dtype)
