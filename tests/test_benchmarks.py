"""The benchmarks' own arithmetic, and that a wrong result is never timed."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from benchmarks import attention, harness, roofline
from benchmarks.bench_cpsa import CPSA
from benchmarks.bench_ipsa import IPSA
from benchmarks.roofline import Ceilings, Work
from catkernels.testing import Shape

SMALL = Shape("two windows", batch=1, height=2, width=4, channels=8, num_heads=2, patch_size=2)
PADDED = Shape("padded", batch=3, height=3, width=2, channels=4, num_heads=1, patch_size=2)
STAGE4 = Shape("one patch", batch=2, height=7, width=7, channels=768, num_heads=24)

# By hand, with maps of 64, 72 and 75264 values, tables of 18, 9 and 4056 and weights of 80, 80 and
# 9800. A product of attention takes 2 x (windows x tokens) x tokens x C; one of all patches with a
# folded matrix 2 x patches x N^4, one with one another 2 x patches x P x N^2.
HAND_COUNTS = [
    (roofline.ipsa_forward_work, SMALL, 4 * 64 + 18, 2 * (2 * 8 * 4 * 8)),
    (roofline.ipsa_forward_work, PADDED, 4 * 72 + 9, 2 * (2 * 24 * 4 * 4)),
    (roofline.ipsa_forward_work, STAGE4, 4 * 75264 + 4056, 2 * (2 * 98 * 49 * 768)),
    (roofline.ipsa_backward_work, SMALL, 7 * 64 + 36, 5 * (2 * 8 * 4 * 8)),
    (roofline.ipsa_backward_work, PADDED, 7 * 72 + 18, 5 * (2 * 24 * 4 * 4)),
    (roofline.ipsa_backward_work, STAGE4, 7 * 75264 + 8112, 5 * (2 * 98 * 49 * 768)),
    (roofline.cpsa_forward_work, SMALL, 2 * 64 + 80, 2 * (2 * 16 * 16) + 2 * (2 * 16 * 2 * 4)),
    (roofline.cpsa_forward_work, PADDED, 2 * 72 + 80, 2 * (2 * 24 * 16) + 2 * (2 * 24 * 2 * 4)),
    (roofline.cpsa_forward_work, STAGE4, 2 * 75264 + 9800, 2 * 1536 * 2401),
    (roofline.cpsa_backward_work, SMALL, 3 * 64 + 160, 5 * (2 * 16 * 16) + 6 * (2 * 16 * 2 * 4)),
    (roofline.cpsa_backward_work, PADDED, 3 * 72 + 160, 5 * (2 * 24 * 16) + 6 * (2 * 24 * 2 * 4)),
    (roofline.cpsa_backward_work, STAGE4, 3 * 75264 + 19600, 2 * (2 * 1536 * 2401)),
]


@pytest.mark.parametrize(
    ("model", "shape", "values", "flops"),
    HAND_COUNTS,
    ids=[f"{model.__name__}-{shape}" for model, shape, *_ in HAND_COUNTS],
)
def test_work_is_what_a_hand_counts(model, shape, values, flops):
    assert model(shape, 2) == Work(2 * values, flops)
    assert model(shape, 4) == Work(4 * values, flops)


def test_a_step_is_both_passes():
    step = IPSA.work(SMALL, torch.float32, "step")
    assert step == Work(4 * (11 * 64 + 3 * 18), 7 * (2 * 8 * 4 * 8))


def test_the_binding_ceiling():
    ceilings = Ceilings(bytes_per_s=100.0, flops_per_s=1000.0)
    assert ceilings.least_s(Work(200, 1000)) == 2.0
    assert ceilings.bound(Work(200, 1000)) == "memory"
    assert ceilings.least_s(Work(100, 5000)) == 5.0
    assert ceilings.bound(Work(100, 5000)) == "compute"


class Stopwatch(SimpleNamespace):
    """In the place of pytest-benchmark's fixture: it remembers what it was asked to time."""

    def __init__(self) -> None:
        super().__init__(extra_info={}, group=None, enabled=True, timed=[])

    def pedantic(self, target, *, setup, rounds):
        for _ in range(rounds):
            setup()
        self.timed.append(target)
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[2.0, 1.0, 4.0]))


def with_a_wrong(provider: str, subject: attention.Attention) -> attention.Attention:
    """The attention with one provider whose results are a thousandth off."""

    def wrong(shape, inputs):
        attend = subject.providers[provider](shape, inputs)
        return lambda: 1.001 * attend()

    return dataclasses.replace(subject, providers=subject.providers | {provider: wrong})


both = pytest.mark.parametrize("subject", [IPSA, CPSA], ids=lambda subject: subject.name)


@both
@pytest.mark.parametrize("direction", ["forward", "backward", "step"])
@pytest.mark.parametrize("provider", ["official", "sdpa", "catkernels"])
def test_a_right_provider_is_timed(subject, direction, provider, monkeypatch):
    monkeypatch.setattr(roofline, "ceilings", lambda dtype: Ceilings(1.0, 1.0))
    case = attention.Case("trial", attention.TRIAL_SHAPE, torch.float32, direction)
    stopwatch = Stopwatch()
    attention.run(stopwatch, subject, case, provider)
    assert len(stopwatch.timed) == 1
    info = stopwatch.extra_info
    assert info["provider"] == provider
    assert info["speedup"] == pytest.approx(info["official_ms"] / info["contender_ms"])


@both
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_wrong_provider_gets_no_number(subject, direction):
    case = attention.Case("trial", attention.TRIAL_SHAPE, torch.float32, direction)
    for provider, outcome in (("catkernels", AssertionError), ("sdpa", pytest.skip.Exception)):
        stopwatch = Stopwatch()
        with pytest.raises(outcome, match="over the budget"):
            attention.run(stopwatch, with_a_wrong(provider, subject), case, provider)
        assert not stopwatch.timed


def test_a_missing_result_is_wrong():
    truth = {"output": torch.ones(2, dtype=torch.float64)}
    with pytest.raises(AssertionError, match="gradient"):
        harness.judge({}, {}, truth | {"gradient": truth["output"]})
