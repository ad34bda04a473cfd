"""What the sweeps over stages share, of attentions and of blocks: directions, official results."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

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

Outputs = Tensor | tuple[Tensor, ...]
# What one is bound to its inputs with: (shape, inputs) -> a callable that gives the outputs.
Provider = Callable[[Shape, dict[str, Tensor]], Callable[[], Outputs]]
# The least that is moved and multiplied, of a shape and the bytes of a value.
WorkModel = Callable[[Shape, int], Work]


@dataclass(frozen=True, eq=False)
class Operation:
    """An attention, a block, or a part of one, as the benchmarks see it.

    Attributes:
        name: "ipsa", "mlp", ...
        make_inputs: shape, dtype and device -> the inputs by name, the map first.
        providers: by name; "official" is what all others are judged by and compared with.
        served_by: shape and inputs -> what serves `catkernels` here.
        forward_work, backward_work: the models of `benchmarks.roofline`.
    """

    name: str
    make_inputs: Callable[..., dict[str, Tensor]]
    providers: dict[str, Provider]
    served_by: Callable[[Shape, dict[str, Tensor]], str]
    forward_work: WorkModel
    backward_work: WorkModel

    def __str__(self) -> str:
        return self.name

    def work(self, shape: Shape, dtype: torch.dtype, direction: str) -> Work:
        passes = {
            "forward": [self.forward_work],
            "backward": [self.backward_work],
            "step": [self.forward_work, self.backward_work],
        }[direction]
        return functools.reduce(Work.__add__, (work(shape, dtype.itemsize) for work in passes))


@dataclass(frozen=True)
class Case:
    """What is computed in one row of a sweep.

    Attributes:
        precision: a dtype of PyTorch's by name, or "autocast": to bfloat16, of float32.
        direction: "forward", which is inference, "backward", or "step" for both in training.
    """

    sweep: str
    shape: Shape
    precision: str
    direction: str

    def __str__(self) -> str:
        return f"{self.sweep}-{self.shape}-{self.precision}-{self.direction}"

    @property
    def dtype(self) -> torch.dtype:
        """Of the inputs."""
        return torch.float32 if self.precision == "autocast" else getattr(torch, self.precision)

    @property
    def products(self) -> torch.dtype:
        """What products are computed in."""
        return torch.bfloat16 if self.precision == "autocast" else self.dtype

    @property
    def with_gradients(self) -> bool:
        return self.direction != "forward"

    def autocasting(self) -> torch.autocast:
        """A context in which the case is computed; of float64 it leaves everything as it is."""
        return torch.autocast(DEVICE.type, self.products, enabled=self.precision == "autocast")


def parametrize(metafunc: pytest.Metafunc, attention: Operation) -> None:
    """Give the benchmark of an attention the rows of this device's sweep, most important first."""
    if metafunc.config.getoption("--trial"):
        directions = "forward backward step"
        every = rows("trial", [TRIAL_SHAPE], "float32", directions, *attention.providers)
    else:
        every = _cpu_sweep() if DEVICE.type == "cpu" else _gpu_sweep()
    served = [(case, provider) for case, provider in every if provider in attention.providers]
    metafunc.parametrize(("case", "provider"), served, ids=str)


def _gpu_sweep() -> Iterator[tuple[Case, str]]:
    passes, main = "forward backward", ("sdpa", "catkernels")
    for batch in (256, 32, 1):
        shapes = cat_stages("small", batch=batch)
        yield from rows("stages", shapes, "bfloat16", f"{passes} step", *main)
    shapes = cat_stages("tiny", batch=256)
    yield from rows("stages", shapes, "bfloat16", f"{passes} step", *main)
    for dtype in ("float16", "float32"):
        yield from rows("dtypes", cat_stages("small", batch=256), dtype, passes, *main)
    for image, batch in ((512, 8), ((800, 1344), 2), ((333, 500), 8)):
        yield from rows("image sizes", cat_stages("small", image, batch), "bfloat16", passes, *main)
    yield from rows("patch sizes", _patch_sizes(batch=64), "bfloat16", passes, *main)
    shapes, peers = cat_stages("small", batch=256), ("official", "compiled", "flex")
    yield from rows("peers", shapes, "bfloat16", passes, *peers)


def _cpu_sweep() -> Iterator[tuple[Case, str]]:
    main = ("sdpa", "catkernels")
    for batch in (1, 8, 16):
        yield from rows("stages", cat_stages("small", batch=batch), "float32", "forward", *main)
    for image in (384, (333, 500)):
        yield from rows("image sizes", cat_stages("small", image), "float32", "forward", *main)
    yield from rows("patch sizes", _patch_sizes(batch=1), "float32", "forward", *main)
    first, *_ = cat_stages("small", batch=8)
    yield from rows("stages", [first], "float32", "step", *main)
    yield from rows("peers", [first], "float32", "forward", "official", "compiled")


def _patch_sizes(batch: int) -> list[Shape]:
    """The first stage of CAT-S at 192 x 192, which all of these but 7 divide."""
    return [
        Shape(f"N{side}-48x48-b{batch}", batch, 48, 48, 96, 3, patch_size=side)
        for side in (4, 7, 8, 12, 16)
    ]


def rows(
    sweep: str, shapes: list[Shape], precision: str, directions: str, *providers: str
) -> Iterator[tuple[Case, str]]:
    """Every case of these, by every provider."""
    for shape in shapes:
        for direction in directions.split():
            for provider in providers:
                yield Case(sweep, shape, precision, direction), provider


def run(
    benchmark, operation: Operation, case: Case, provider: str, rounds: int | None = None
) -> None:
    """Judge a provider's results, then time it in turn with the official operations."""
    inputs = make_leaves(operation, case.shape, case.dtype)
    attend = _judged(operation, case, provider, inputs)
    official = bound(operation, case, "official", inputs)
    benchmark.group = f"{operation.name} {case.shape} {case.precision} {case.direction}"
    benchmark.extra_info.update(
        operation=operation.name,
        sweep=case.sweep,
        provider=provider,
        direction=case.direction,
        dtype=case.precision,
        num_patches=case.shape.num_patches,
        **dataclasses.asdict(case.shape),
    )
    if provider == "catkernels":
        with torch.inference_mode(not case.with_gradients), case.autocasting():
            benchmark.extra_info["served_by"] = operation.served_by(case.shape, inputs)
    harness.race(
        benchmark,
        workload(case.direction, attend, inputs),
        workload(case.direction, official, inputs),
        rounds=rounds or ROUNDS,
        work=operation.work(case.shape, case.dtype, case.direction),
        ceilings=roofline.ceilings(case.products),
    )


def bound(
    operation: Operation, case: Case, provider: str, inputs: dict[str, Tensor]
) -> Callable[[], Outputs]:
    """The provider's function of these inputs, in the case's precision."""
    attend = operation.providers[provider](case.shape, inputs)
    if case.precision != "autocast":
        return attend

    def autocasting() -> Outputs:
        with case.autocasting():
            return attend()

    return autocasting


def _judged(
    operation: Operation, case: Case, provider: str, inputs: dict[str, Tensor]
) -> Callable[[], Outputs]:
    """The provider's function of these inputs, whose results keep the error budget."""
    with harness.admitting(provider):
        attend = bound(operation, case, provider, inputs)
        contender = results(attend, inputs, case.with_gradients)
        # both directions of training have the same results
        judged = replace(case, sweep="", direction="step" if case.with_gradients else "forward")
        official, truth = (
            official_results(operation, judged, computed_in)
            for computed_in in (case.dtype, torch.float64)
        )
        harness.judge(contender, official, truth)
    return attend


@functools.lru_cache(maxsize=1)
def make_leaves(
    operation: Operation,
    shape: Shape,
    dtype: torch.dtype,
    computed_in: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The inputs by name, rounded to ``dtype``, for a computation in another one if need be.

    As in a model, the map comes first and is a tensor, and everything else is a parameter.
    """
    inputs = operation.make_inputs(shape, dtype, DEVICE)
    (name, x), *parameters = (
        (name, tensor.to(computed_in or dtype)) for name, tensor in inputs.items()
    )
    return {name: x.requires_grad_()} | {name: nn.Parameter(t) for name, t in parameters}


@functools.lru_cache(maxsize=2)
def official_results(
    operation: Operation, case: Case, computed_in: torch.dtype
) -> dict[str, Tensor]:
    """What the official operations make of a case's inputs, computed in another dtype."""
    inputs = make_leaves.__wrapped__(operation, case.shape, case.dtype, computed_in)
    with tf32_products():
        official = bound(operation, case, "official", inputs)
        return results(official, inputs, case.with_gradients)


def title(operation: str) -> str:
    """What tables and figures call an operation: "IPSA block" of "ipsa block"."""
    return re.sub(r"\b(ipsa|cpsa|mlp)\b", lambda name: name[0].upper(), operation)


def serving(reasons: list[str]) -> str:
    """What serves a call that the kernels cannot serve for these reasons."""
    on_cpu = "PyTorch on the CPU" if DEVICE.type == "cpu" else "reference"
    return f"{on_cpu}: {'; '.join(reasons)}" if reasons else "triton"


def results(
    attend: Callable[[], Outputs], inputs: dict[str, Tensor], with_gradients: bool
) -> dict[str, Tensor]:
    """The outputs and, where asked for, the gradients of all inputs, by name."""
    with torch.inference_mode(not with_gradients):
        outputs = _several(attend())
    named = {f"output {i}" if i else "output": output.detach() for i, output in enumerate(outputs)}
    if not with_gradients:
        return named
    gradients = torch.autograd.grad(outputs, list(inputs.values()), cotangents(outputs))
    names = [f"gradient of {name}" for name in inputs]
    return named | dict(zip(names, gradients, strict=True))


def workload(
    direction: str, attend: Callable[[], Outputs], inputs: dict[str, Tensor]
) -> Callable[[], object]:
    """What is timed: the forward pass in inference mode, the backward pass alone, or both."""
    leaves = list(inputs.values())
    if direction == "forward":
        return torch.inference_mode()(attend)
    outputs = _several(attend())
    grads = cotangents(outputs)
    if direction == "backward":
        return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
    return lambda: torch.autograd.grad(_several(attend()), leaves, grads)


def _several(outputs: Outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def cotangents(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of the outputs, the same in every dtype: rounded to bfloat16, the coarsest."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    normal = functools.partial(torch.randn, dtype=torch.float32, generator=generator)
    grads = (normal(output.shape, device=DEVICE) for output in outputs)
    return [grad.bfloat16().to(output.dtype) for grad, output in zip(grads, outputs, strict=True)]
