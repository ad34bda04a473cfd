"""Whole models at 224 x 224: inference, training, and the latency of one image.

Training is forward pass, loss and backward pass, without the optimizer's step, which no provider
changes. Stochastic depth is off, so that all providers compute the same. On a GPU everything runs
under autocast to bfloat16, on a CPU in float32.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import catkernels
from benchmarks import harness, roofline
from benchmarks.clock import CLOCK, DEVICE
from benchmarks.roofline import Work
from catkernels import official
from catkernels.cat import VARIANTS
from catkernels.complexity import count_macs

ROUNDS = 7
DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
# Of each batch so many images are judged: float64 takes long and much memory.
JUDGED_IMAGES = 2
TRIAL = {"embed_dim": 32, "depths": (1,), "num_heads": (1,)}


def patched(**options) -> nn.Module:
    """The official model, patched."""
    model = official.CAT(**options)
    catkernels.patch(model)
    return model


PROVIDERS: dict[str, Callable[..., nn.Module]] = {
    "official": official.CAT,
    "official, checkpointed": functools.partial(official.CAT, checkpoint_always=True),
    "compiled": lambda **options: harness.compiled(official.CAT(**options)),
    "catkernels": catkernels.CAT,
    "patched": patched,
    "catkernels, compiled": lambda **options: harness.compiled(catkernels.CAT(**options)),
}


@dataclass(frozen=True)
class Case:
    """What one row computes: a model, and what it does with how many images.

    Attributes:
        model: a key of `catkernels.cat.VARIANTS`, or "trial".
        mode: "inference", "replay" (inference from a CUDA graph), "training", or "latency" (one
            image from the call to the result, by the host's clock).
    """

    model: str
    mode: str
    batch: int

    def __str__(self) -> str:
        return f"{self.model}-{self.mode}-b{self.batch}"

    @property
    def options(self) -> dict:
        """The model's arguments."""
        variant = TRIAL if self.model == "trial" else VARIANTS[self.model]
        return variant | {"drop_path_rate": 0.0}


def rows(*, trial: bool) -> Iterator[tuple[Case, str]]:
    """The sweep of this device, what matters most first."""
    everybody = list(PROVIDERS)
    if trial:
        sweep = [("trial", mode, 2, everybody) for mode in ("inference", "training", "latency")]
    elif DEVICE.type == "cpu":
        ours = ["catkernels"]
        sweep = [(name, "latency", 1, ours) for name in VARIANTS]
        sweep += [("cat_tiny", "inference", 8, ours), ("cat_tiny", "training", 2, ours)]
    else:
        ours, slow = ["catkernels"], ["compiled", "catkernels, compiled"]
        sweep = []
        for name in VARIANTS:
            sweep += [(name, mode, 128, ours) for mode in ("inference", "training", "replay")]
            sweep += [(name, "latency", 1, ours), (name, "replay", 1, ours)]
            sweep += [(name, "training", 128, ["official, checkpointed"])]
        sweep += [
            ("cat_small", mode, batch, slow)
            for mode, batch in (("inference", 128), ("training", 128), ("latency", 1))
        ]
    for model, mode, batch, providers in sweep:
        yield from ((Case(model, mode, batch), provider) for provider in providers)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    of_latency = metafunc.function is test_latency
    every = rows(trial=metafunc.config.getoption("--trial"))
    chosen = [row for row in every if (row[0].mode == "latency") == of_latency]
    metafunc.parametrize(("case", "provider"), chosen, ids=str)


def test_model(benchmark, case: Case, provider: str):
    race(benchmark, case, provider, capture=case.mode == "replay")


@pytest.mark.benchmark(timer=time.perf_counter)
def test_latency(benchmark, case: Case, provider: str):
    race(benchmark, case, provider, capture=False, clock=time.perf_counter)


def race(benchmark, case: Case, provider: str, *, capture: bool, clock: Callable = CLOCK) -> None:
    """Judge a provider's model, then time it in turn with the official one."""
    contender, baseline = (_build(case, name) for name in (provider, "official"))
    with harness.admitting(provider):
        _judge(case, contender, baseline)
    benchmark.group = f"{case.model} {case.mode} b{case.batch}"
    benchmark.extra_info.update(
        operation="model",
        name=case.model,
        direction=case.mode,
        provider=provider,
        dtype=str(DTYPE).removeprefix("torch."),
        batch=case.batch,
    )
    images = _images(case.batch)
    harness.race(
        benchmark,
        _workload(case, contender, images),
        _workload(case, baseline, images),
        rounds=ROUNDS,
        clock=clock,
        capture=capture,
        work=_work(case),
        ceilings=roofline.ceilings(DTYPE),
    )


def _build(case: Case, provider: str) -> nn.Module:
    """The provider's model, with the parameters that every provider's has."""
    torch.manual_seed(0)
    model = PROVIDERS[provider](**case.options).to(DEVICE)
    return model.train(case.mode == "training")


def _images(batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, 224, 224, generator=generator).to(DEVICE)


def _judge(case: Case, contender: nn.Module, baseline: nn.Module) -> None:
    """Logits, or in training the loss and the gradient of all parameters as one vector."""
    truth = _build(case, "official").double()
    images = _images(case.batch)

    def results(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        if case.mode != "training":
            return {"logits": _infer(model, images)[:JUDGED_IMAGES]}
        loss = _loss(model, images, JUDGED_IMAGES)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        return {"loss": loss.detach(), "gradient": torch.cat([g.flatten() for g in gradients])}

    judged = (results(model, images) for model in (contender, baseline))
    harness.judge(*judged, results(truth, images[:JUDGED_IMAGES].double()))


def _workload(case: Case, model: nn.Module, images: Tensor) -> Callable[[], object]:
    if case.mode == "training":
        parameters = list(model.parameters())
        return lambda: torch.autograd.grad(_loss(model, images), parameters)
    if case.mode == "latency" and DEVICE.type != "cpu":
        wait = torch.get_device_module(DEVICE).synchronize
        return lambda: (_infer(model, images), wait())
    return lambda: _infer(model, images)


def _infer(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode(), _autocast(images):
        return model(images)


def _loss(model: nn.Module, images: Tensor, counted: int | None = None) -> Tensor:
    """Cross-entropy of the first images, or of all, each with a label of its own."""
    with _autocast(images):
        logits = model(images)[:counted]
        return F.cross_entropy(logits, torch.arange(len(logits), device=DEVICE))


def _autocast(images: Tensor) -> torch.autocast:
    enabled = DEVICE.type != "cpu" and images.dtype != torch.float64
    return torch.autocast(DEVICE.type, DTYPE, enabled=enabled)


@functools.cache
def _work(case: Case) -> Work:
    """By the official model's products; the parameters and images must be read, gradients written.

    A backward pass takes two products for each of the forward pass.
    """
    with torch.device("meta"):
        model = official.CAT(**case.options)
        images = torch.empty(case.batch, 3, 224, 224)
    flops = 2 * count_macs(model, images)
    parameter_bytes = sum(parameter.nbytes for parameter in model.parameters())
    if case.mode == "training":
        return Work(2 * parameter_bytes + images.nbytes, 3 * flops)
    return Work(parameter_bytes + images.nbytes, flops)
