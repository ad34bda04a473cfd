"""Two processes with patched models in DistributedDataParallel and FSDP2, on the CPU.

They go on with the training of an unpatched model, whose state they load (`two_processes`). Here an
unpatched model goes on with it in one process, on the whole batch, and comes to the same: its
weights, its optimizer's momentum, which is the sum of the gradients, and what it makes of images.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache, partial

import pytest
import torch
from fresh_process import ROOT, torchrun
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.optim import SGD
from two_processes import (
    KERNELS,
    KINDS,
    MIXED_PRECISION,
    REFERENCE,
    SIZES,
    build,
    load,
    train_step,
)

from catkernels.accuracy import assert_draws_within_error_budget, assert_within_error_budget

pytest.importorskip("triton")

# float64 rounds gradients of up to some hundreds at 1e-14; those of the bias tables are about 1e-6
assert_close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the two processes leave of every case; one start of them serves all tests."""
    folder = tmp_path_factory.mktemp("two_processes")
    for kind in KINDS:
        torch.save(first_step(kind), folder / f"{kind}.pt")
    torchrun(2, str(ROOT / "tests" / "two_processes.py"), str(folder))
    return folder


@pytest.fixture
def two_processes(folder):
    """The second step of two processes, by the name of its case."""
    return lambda name: torch.load(folder / f"{name}.pt")


@cache
def first_step(kind: str) -> dict:
    """The state of an unpatched model after one step, and the images; in float32."""
    torch.manual_seed(0)
    model, optimizer = build(kind, torch.float32)
    images = torch.randn(4, 3, *SIZES[kind])
    train_step(model, optimizer, images)
    return {"state": get_state_dict(model, optimizer), "images": images}


def started_run(kind: str, dtype: torch.dtype) -> tuple[nn.Module, SGD, torch.Tensor]:
    """The unpatched model after its first step, its optimizer and the images."""
    # a copy, since an optimizer goes on with the very tensors that it loads
    start = deepcopy(first_step(kind))
    model, optimizer = build(kind, dtype)
    load(model, optimizer, start["state"])
    return model, optimizer, start["images"].to(dtype)


@cache
def second_step(kind: str, dtype: torch.dtype) -> dict:
    """The same as in `two_processes`, but of one process and unpatched."""
    model, optimizer, images = started_run(kind, dtype)
    train_step(model, optimizer, images)
    with torch.no_grad():
        return {"state": get_state_dict(model, optimizer), "outputs": model(images)}


def gradients(result: dict) -> dict[str, torch.Tensor]:
    """The momentum of every parameter, by its name."""
    _, optimizer = result["state"]
    return {name: state["momentum_buffer"] for name, state in optimizer["state"].items()}


@pytest.mark.parametrize("name", REFERENCE)
def test_two_processes_come_to_what_one_comes_to(name, two_processes):
    actual, case = two_processes(name), REFERENCE[name]
    expected = second_step(case.kind, case.dtype)
    model, _ = build(case.kind, case.dtype)
    assert gradients(actual).keys() == dict(model.named_parameters()).keys()
    assert_close(gradients(actual), gradients(expected))
    assert_close(actual["state"][0], expected["state"][0])
    assert_close(actual["outputs"], expected["outputs"])


@pytest.mark.parametrize("name", REFERENCE)
def test_an_unpatched_model_goes_on_where_they_stopped(name, two_processes):
    case, saved = REFERENCE[name], two_processes(name)
    model, optimizer = build(case.kind, case.dtype)
    load(model, optimizer, saved["state"])
    uninterrupted, its_optimizer, images = started_run(case.kind, case.dtype)
    train_step(uninterrupted, its_optimizer, images)
    with torch.no_grad():
        assert_close(model(images), saved["outputs"])

    train_step(model, optimizer, images)
    train_step(uninterrupted, its_optimizer, images)
    assert_close(model.state_dict(), uninterrupted.state_dict())


def assert_step_within_error_budget(actual, same_dtype, float64) -> None:
    results = (actual, same_dtype, float64)
    outputs = [result["outputs"] for result in results]
    for tensors in zip(*outputs, strict=True):
        assert_within_error_budget(*tensors)
    every = [gradients(result) for result in results]
    # those of one role together: some single ones cancel to nothing but rounding
    draws = (
        {".".join(name.split(".")[-2:]): tuple(one[name] for one in every)} for name in every[0]
    )
    assert_draws_within_error_budget(draws, "step")


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_in_two_processes(name, two_processes):
    case = KERNELS[name]
    actual, eager = two_processes(name), second_step(case.kind, case.dtype)
    assert gradients(actual).keys() == gradients(eager).keys()
    truth = second_step(case.kind, torch.float64)
    assert_step_within_error_budget(actual, eager, truth)


def test_mixed_precision_of_fsdp2(two_processes):
    patched, unpatched = map(two_processes, MIXED_PRECISION)
    assert patched["outputs"].dtype == torch.bfloat16
    truth = second_step("classifier", torch.float64)
    assert_step_within_error_budget(patched, unpatched, truth)
