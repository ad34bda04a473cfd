"""The calls by which each family of kernels is checked, compiled ahead and timed."""

from __future__ import annotations

import pytest
import torch

from catkernels import families
from catkernels.block_cases import JoinedCPSACase, MLPCase, NormCase, ProjectionCase
from catkernels.cat import VARIANTS
from catkernels.commands import check

EVERY = [*families.FAMILIES.items(), *families.INTERPRETED.items()]


@pytest.mark.parametrize(("family", "cases"), EVERY, ids=[name for name, _ in EVERY])
def test_every_call_has_a_name_of_its_own_and_is_one_that_kernels_serve(family, cases):
    pytest.importorskip("triton")
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    for case in cases:
        needs_grad = not isinstance(case, JoinedCPSACase)
        assert not case.unsupported_reasons(torch.device("cuda"), torch.float16, needs_grad)


def test_of_float32_alone_nothing_is_mixed():
    cases = families.FAMILIES["cpsa, map in float32"]
    task = families.Task("mixed", cases, torch.float32, False, "cuda")
    assert list(task.passes()) == []
    assert len(families.compilations([task])) == 0


def test_each_family_is_a_task_in_each_precision():
    tasks = families.tasks("cuda", None, ("float16", "tf32"))
    assert len(tasks) == len({str(task) for task in tasks}) == 2 * len(families.FAMILIES)
    assert {(task.dtype, task.tf32) for task in tasks[1::2]} == {(torch.float32, True)}


def test_all_stages_of_cat_small_are_among_them():
    """At 224 x 224 pixels: maps of 56, 28, 14 and 7 pixels a side."""
    sizes = {
        (case.shape.height, case.shape.channels)
        for cases in families.FAMILIES.values()
        for case in cases
    }
    channels = VARIANTS["cat_small"]["embed_dim"]
    assert {(56 >> stage, channels << stage) for stage in range(4)} <= sizes


def judged(case, dtype, device):
    task = families.Task("rows", (case,), dtype, False, device.type, repeats=1)
    row = check.judge(task)
    assert row.verdict == "right", row.detail


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("channels", "dtype"), [(32, torch.float16), (384, torch.float32)])
def test_an_mlp_by_the_kernels_is_what_it_is_said_to_be(channels, dtype, mixed, device, launches):
    """In one kernel where its rows are short enough, else between PyTorch's products."""
    if mixed:
        dtype = torch.float16
    judged(MLPCase("rows that fill no tile", 2, 3, 7, channels, mixed, 0.2 * mixed), dtype, device)
    assert bool(launches["mlp_forward_kernel"]) == (channels == 32)
    assert bool(launches["bias_gelu_backward_kernel"]) == (channels == 384)


@pytest.mark.parametrize("mixed", [False, True])
def test_projections_by_the_kernels_are_what_they_are_said_to_be(mixed, device, launches):
    case = ProjectionCase("rows that fill no tile", 2, 3, 7, 32, mixed, 0.2 * mixed)
    judged(case, torch.float16, device)
    assert launches["norm_linear_kernel"] == launches["linear_residual_kernel"] == 2
    assert case.unsupported_reasons(device, torch.float32, needs_grad=False)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_joined_cpsa_by_the_kernels_is_what_it_is_said_to_be(mixed, device, launches):
    case = JoinedCPSACase("padded", 2, 5, 7, 32, mixed, 0.2 * mixed)
    judged(case, torch.float16, device)
    assert launches["row_statistics_kernel"] == launches["cpsa_map_forward_kernel"] == 2
    assert case.unsupported_reasons(device, torch.float32, needs_grad=False)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_norm_by_the_kernels_is_what_it_is_said_to_be(mixed, device, launches):
    judged(
        NormCase("rows that fill no tile", 2, 3, 7, 40, mixed, 0.2 * mixed), torch.float16, device
    )
    assert launches["norm_backward_kernel"] == 2
