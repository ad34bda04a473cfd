"""CPSA's kernels against float64: every launch of every architecture, forward and backward."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from kernel_cases import BF16, DTYPES, FP16, FP32, check, compared

from catkernels.accuracy import assert_within_error_budget
from catkernels.cases import (
    CPSA_LARGE,
    CPSA_ODD_SHAPES,
    CPSA_PATCH_COUNTS,
    CPSACase,
    Inputs,
    converted,
    cpsa_case,
    make_cpsa_inputs,
    random_grad,
    results,
)
from catkernels.dropout import SameDropout
from catkernels.ops import cpsa

pytestmark = pytest.mark.usefixtures(
    "round_to_nearest_bf16", "poisoned_memory", "launches", "tf32_on_gpus"
)


@pytest.fixture(params=["sm_80", "sm_90", "gfx9", pytest.param("sm_100", marks=pytest.mark.full)])
def architecture(request, launch_as_on) -> str:
    """Kernels are launched here as on this architecture; a GPU has its own launches alone."""
    launch_as_on(request.param)
    return request.param


@pytest.fixture
def launch_as_on(device, monkeypatch) -> Callable[[str], None]:
    from catkernels.kernels.launch import architecture as architecture_of

    def pretend(architecture: str) -> None:
        if device.type != "cpu" and architecture_of(device) != architecture:
            pytest.skip("launches of another architecture")
        monkeypatch.setattr("catkernels.kernels.launch.architecture", lambda _: architecture)

    return pretend


def by_patches(case: CPSACase) -> str:
    return f"P{case.shape.num_patches}"


def every_number_of_patches():
    """Each number of patches with one dtype, by turns; `--full` takes the other two as well."""
    for turn, case in enumerate(CPSA_PATCH_COUNTS):
        for place, dtype in enumerate(DTYPES):
            marks = () if turn % 3 == place else pytest.mark.full
            name = f"{by_patches(case)}-{str(dtype).removeprefix('torch.')}"
            yield pytest.param(case, dtype, id=name, marks=marks)


@pytest.mark.parametrize(("case", "dtype"), list(every_number_of_patches()))
def test_every_number_of_patches(case, dtype, device, launches):
    check((case, case.inputs(dtype, device)))
    # for the forward pass, and for the backward pass
    assert launches["cpsa_fold_weights_kernel"] == launches["cpsa_prepare_weights_kernel"] == 1


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CPSA_LARGE, ids=by_patches)
def test_large_numbers_of_patches(case, dtype, device):
    check((case, case.inputs(dtype, device)))


@pytest.mark.parametrize("case", CPSA_ODD_SHAPES, ids=str)
def test_odd_shapes(case, device):
    # of N = 1 there are 4 weights: in one draw plain PyTorch's gradients may be near exact by luck
    number = 8 if case.patch_size == 1 else 1
    check(*((case, case.inputs(FP16, device, seed)) for seed in range(number)))


@pytest.mark.parametrize(
    "case",
    [
        cpsa_case(7, 7, 9),
        cpsa_case(14, 14, 17),
        cpsa_case(28, 28, 9),
        cpsa_case(35, 35, 3),
        cpsa_case(56, 56, 3),
    ],
    ids=by_patches,
)
def test_launches_of_every_architecture(case, device, architecture):
    check((case, case.inputs(BF16, device)))


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_random_shapes(dtype, device, full):
    """Shapes as nobody would pick them, 1000 in all with `--full`."""
    generator = random.Random(str(dtype))

    def draw() -> tuple[CPSACase, Inputs]:
        # of N = 1 there are 4 weights, whose gradients may cancel to nothing but rounding
        patch_size = generator.randint(2, 8)
        height, width = (generator.randint(1, 9 * patch_size) for _ in range(2))
        case = cpsa_case(height, width, generator.randint(1, 9), patch_size)
        return case, case.inputs(dtype, device, seed=generator.randint(0, 2**31))

    for _ in range(25 if full else 1):
        check(*(draw() for _ in range(20 if full else 5)))


# in plain runs the smallest and the largest
@pytest.mark.parametrize(
    "weight_std", [1e-3, *(pytest.param(std, marks=pytest.mark.full) for std in (3e-2, 1.0)), 3.0]
)
@pytest.mark.parametrize("case", [cpsa_case(14, 14, 64, batch=2), CPSA_PATCH_COUNTS[12]], ids=str)
def test_weights_of_any_size(weight_std, case, device):
    # where large scores of two patches are nearly the same, rounding decides between them: it does
    # so in few places, and in one draw plain PyTorch may be spared
    draw = functools.partial(make_cpsa_inputs, case.shape, FP16, device, weight_std=weight_std)
    inputs = [draw(seed=seed) for seed in range(6)]
    grad = random_grad(case.shape, inputs[0]["x"]) / 16
    check(*((case, drawn) for drawn in inputs), grad_out=grad)


@pytest.mark.parametrize("case", [CPSA_PATCH_COUNTS[3], CPSA_PATCH_COUNTS[12]], ids=str)
def test_scores_that_overflow_exp(case, device):
    inputs = case.inputs(FP32, device)
    inputs["x"] *= 100
    check((case, inputs))
    inputs["x"] *= 1e-6
    check((case, inputs))


@pytest.mark.parametrize("missing", ["qkv_bias", "proj_bias"])
def test_missing_bias_and_explicit_scale(missing, device):
    case = replace(cpsa_case(14, 21, 5), without=(missing,), scale=0.5)
    check((case, case.inputs(FP16, device)))


def test_any_strides(device):
    case = cpsa_case(14, 14, 6, batch=2)
    inputs = case.inputs(FP16, device)
    permuted = inputs["x"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    surroundings = inputs["x"].new_full((4, 16, 16, 9), float("nan"))
    surroundings[1:3, 1:15, 1:15, 2:8] = inputs["x"]
    grad_out = torch.randn(6, device=device).to(FP16).expand(case.shape.size)
    for x in (inputs["x"], permuted, surroundings[1:3, 1:15, 1:15, 2:8]):
        check((case, inputs | {"x": x}), grad_out=grad_out)


@pytest.mark.parametrize("case", [CPSA_PATCH_COUNTS[3], CPSA_PATCH_COUNTS[12]], ids=str)
def test_nothing_is_read_beside_the_inputs(case, device):
    inputs = case.inputs(FP16, device)
    surroundings = inputs["x"].new_full((case.batch + 2, *inputs["x"].shape[1:]), float("nan"))
    surroundings[1:-1] = inputs["x"]
    check((case, inputs | {"x": surroundings[1:-1]}))


@pytest.mark.parametrize(
    ("case", "architecture"),
    [
        (cpsa_case(14, 14, 17, batch=3), "sm_90"),  # fetches the next tile ahead
        (cpsa_case(35, 35, 9), "sm_90"),  # takes every second tile
        (cpsa_case(14, 14, 17, batch=3), "sm_80"),  # in three passes
        (cpsa_case(63, 70, 1), "sm_80"),
    ],
    ids=str,
    indirect=["architecture"],
)
def test_any_chunking_gives_the_same_bits(case, architecture, device, monkeypatch):
    inputs = case.inputs(FP16, device)
    grad_out = random_grad(case.shape, inputs["x"])
    first = results(case.attend, inputs, grad_out)
    for name, tensor in results(case.attend, inputs, grad_out).items():
        assert torch.equal(tensor, first[name]), name
    monkeypatch.setattr("catkernels.kernels.cpsa.launch.Problem.wide", True)
    for module in ("backward", "flash_backward"):
        monkeypatch.setattr(f"catkernels.kernels.cpsa.{module}.PROGRAMS", 2)
    chunked = results(case.attend, inputs, grad_out)
    for name in ("out", "dx"):
        assert torch.equal(chunked[name], first[name]), name


@pytest.mark.parametrize("case", [CPSA_PATCH_COUNTS[3], CPSA_PATCH_COUNTS[12]], ids=by_patches)
def test_sums_in_blocks_of_any_size_give_the_same_bits(case, device, monkeypatch):
    """32 as on GPUs, 1024 as in the other tests, where every program costs the interpreter time."""
    inputs = case.inputs(FP16, device)
    grad_out = random_grad(case.shape, inputs["x"])
    by_block = []
    for block in (32, 1024):
        monkeypatch.setattr("catkernels.kernels.cpsa.weights.SUM_BLOCK", block)
        by_block.append(results(case.attend, inputs, grad_out))
    for name, tensor in by_block[0].items():
        assert torch.equal(tensor, by_block[1][name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("sizes", [(14, 14, 17), (63, 70, 1)], ids=["map", "flash"])
def test_what_is_not_finite_stays_in_its_image(sizes, value, device, launch_as_on, monkeypatch):
    # in one program, whose tiles of both images come one after the other
    launch_as_on("sm_90")
    monkeypatch.setattr("catkernels.kernels.cpsa.backward.PROGRAMS", 1)
    case = cpsa_case(*sizes, batch=2)
    inputs = case.inputs(FP16, device)
    grad_out = random_grad(case.shape, inputs["x"])
    clean = results(case.attend, inputs, grad_out)
    inputs["x"][0, 3, 5, 0] = value
    actual = results(case.attend, inputs, grad_out)
    for name in ("out", "dx"):
        assert torch.equal(actual[name][1], clean[name][1]), name
    # what the reference's sums over all images are, these are
    specified = results(case.specified, inputs, grad_out)
    for name in specified.keys() - {"out", "dx"}:
        assert actual[name].isfinite().all() == specified[name].isfinite().all(), name


@pytest.mark.full
def test_more_sequences_than_a_grid_axis_holds(device):
    case = cpsa_case(1, 1, 768, patch_size=1, batch=128)
    x, *weights = case.inputs(FP16, device).values()
    with torch.no_grad():
        whole, *halves = (case.attend(part, *weights) for part in (x, *x.split(64)))
    assert x.shape[0] * x.shape[3] == 98_304
    assert torch.equal(whole, torch.cat(halves))


@pytest.mark.launches_nothing
def test_an_empty_batch_launches_nothing(device):
    case = cpsa_case(14, 14, 3, batch=0)
    inputs = case.inputs(FP32, device)
    found = results(case.attend, inputs, random_grad(case.shape, inputs["x"]))
    assert found.pop("out").shape == found.pop("dx").shape == (0, 14, 14, 3)
    assert found.keys() == {f"d{name}" for name in inputs if name != "x"}
    assert all(torch.count_nonzero(grad) == 0 for grad in found.values())


@pytest.mark.parametrize(
    "case", [CPSA_PATCH_COUNTS[4], CPSA_PATCH_COUNTS[8], CPSA_PATCH_COUNTS[12]], ids=str
)
def test_float32_map_is_rounded_in_the_kernel(case, device):
    """Under autocast the map and the weights are float32, the products and the output half."""
    inputs = case.inputs(FP32, device)
    grad_out = random_grad(case.shape, inputs["x"]).half()
    options = {"patch_size": 7, "scale": 1 / 7, "dropout_p": 0.0, "dtype": FP16}
    actual = results(partial(cpsa.cpsa_attention, **options), inputs, grad_out)
    with torch.autocast(device.type, FP16):
        same_dtype = results(case.specified, inputs, grad_out)
    float64 = results(case.specified, converted(inputs, torch.float64), grad_out.double())
    assert actual.keys() == float64.keys()
    assert actual["out"].dtype == FP16
    for name, tensor in actual.items():
        assert name == "out" or tensor.dtype == FP32
        # the kernels round the folded weights once; eager rounds each of the four
        judged = tensor.to(FP16), same_dtype[name].to(FP16), float64[name]
        assert_within_error_budget(*judged, name)


def test_folding_is_more_accurate(device):
    case = cpsa_case(28, 28, 16)
    for name, found in compared(case, case.inputs(FP16, device)).items():
        folded, unfolded, truth = (tensor.double() for tensor in found)
        errors = [(tensor - truth).square().mean() for tensor in (folded, unfolded)]
        assert errors[0] <= 1.05 * errors[1], name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [CPSA_PATCH_COUNTS[turn] for turn in (0, 3, 8, 12)], ids=by_patches
)
def test_dropout(case, dtype, device, launch_as_on):
    if device.type == "cpu":
        # all gradients in one pass of half precision, in three of float32
        launch_as_on("sm_80" if dtype == FP32 else "sm_90")
    case, seed = replace(case, dropout_p=0.25), 0x1234_5678_9ABC_DEF0
    keep = case.kept(seed)
    assert 0.7 < keep.double().mean() < 0.8
    with SameDropout(seed, keep):
        check((case, case.inputs(dtype, device)))


def test_dropout_draws_anew_and_follows_the_generator(device):
    case = replace(cpsa_case(14, 14, 3), dropout_p=0.5)
    inputs = case.inputs(FP32, device).values()
    torch.manual_seed(1)
    first, second = case.attend(*inputs), case.attend(*inputs)
    torch.manual_seed(1)
    assert torch.equal(case.attend(*inputs), first)
    assert not torch.equal(first, second)
