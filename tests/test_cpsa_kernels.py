"""CPSA's kernels against float64: every launch of every architecture, forward and backward."""

from __future__ import annotations

import random

import pytest
import torch
from cpsa_cases import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    NAMES,
    assert_right,
    compared,
    kernels,
    make_grad,
    make_inputs,
    with_gradients,
)
from torch import Tensor

from catkernels import reference
from catkernels.accuracy import (
    assert_draws_within_error_budget,
    assert_within_error_budget,
)
from catkernels.cases import CPSA_LARGE, CPSA_ODD_SHAPES, CPSA_PATCH_COUNTS, cpsa_shape
from catkernels.dropout import SameDropout, kept

pytest.importorskip("triton")

DTYPES = pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=["fp32", "fp16", "bf16"])

pytestmark = pytest.mark.usefixtures(
    "round_to_nearest_bf16", "poisoned_memory", "launches", "tf32_on_gpus"
)


@pytest.fixture(params=["sm_80", "sm_90", "gfx9", pytest.param("sm_100", marks=pytest.mark.full)])
def architecture(request, monkeypatch) -> str:
    """Kernels are launched here as on this architecture; a GPU has its own launches alone."""
    launch_as_on(request.param, monkeypatch)
    return request.param


def launch_as_on(architecture: str, monkeypatch) -> None:
    from catkernels.kernels.launch import architecture as architecture_of

    if DEVICE.type != "cpu" and architecture_of(DEVICE) != architecture:
        pytest.skip("launches of another architecture")
    monkeypatch.setattr("catkernels.kernels.launch.architecture", lambda _: architecture)


def every_number_of_patches():
    """Each number of patches with one dtype, by turns; `--full` takes the other two as well."""
    for turn, shape in enumerate(CPSA_PATCH_COUNTS):
        for place, dtype in enumerate((FP32, FP16, BF16)):
            marks = () if turn % 3 == place else pytest.mark.full
            name = f"P{shape.num_patches}-{str(dtype).removeprefix('torch.')}"
            yield pytest.param(shape, dtype, id=name, marks=marks)


@pytest.mark.parametrize(("shape", "dtype"), list(every_number_of_patches()))
def test_every_number_of_patches(shape, dtype, launches):
    assert_right(make_inputs(shape, dtype), dtype, patch_size=7)
    assert launches["cpsa_prepare_weights_kernel"] == 2


@pytest.mark.full
@DTYPES
@pytest.mark.parametrize("shape", CPSA_LARGE, ids=lambda s: f"P{s.num_patches}")
def test_large_numbers_of_patches(shape, dtype):
    assert_right(make_inputs(shape, dtype), dtype, patch_size=7)


@pytest.mark.parametrize("shape", CPSA_ODD_SHAPES, ids=str)
def test_odd_shapes(shape):
    assert_right(make_inputs(shape, FP16), FP16, patch_size=shape.patch_size)


@pytest.mark.parametrize(
    "shape",
    [
        cpsa_shape(7, 7, 9),
        cpsa_shape(14, 14, 17),
        cpsa_shape(28, 28, 9),
        cpsa_shape(35, 35, 3),
        cpsa_shape(56, 56, 3),
    ],
    ids=lambda s: f"P{s.num_patches}",
)
def test_launches_of_every_architecture(shape, architecture):
    assert_right(make_inputs(shape, BF16), BF16, patch_size=7)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_random_shapes(dtype, full):
    """Shapes as nobody would pick them, 1000 in all with `--full`."""
    generator = random.Random(str(dtype))

    def draw() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        # of N = 1 there are 4 weights, whose gradients may cancel to nothing but rounding
        patch_size = generator.randint(2, 8)
        height, width = (generator.randint(1, 9 * patch_size) for _ in range(2))
        shape = cpsa_shape(height, width, generator.randint(1, 9), patch_size)
        inputs = make_inputs(shape, dtype, seed=generator.randint(0, 2**31))
        return compared(inputs, dtype, patch_size=patch_size)

    for _ in range(25 if full else 1):
        assert_draws_within_error_budget(
            [draw() for _ in range(20 if full else 5)], "random shapes"
        )


# in plain runs the smallest and the largest
@pytest.mark.parametrize(
    "weight_std", [1e-3, *(pytest.param(std, marks=pytest.mark.full) for std in (3e-2, 1.0)), 3.0]
)
@pytest.mark.parametrize("shape", [cpsa_shape(14, 14, 64, batch=2), CPSA_PATCH_COUNTS[12]], ids=str)
def test_weights_of_any_size(weight_std, shape):
    inputs = make_inputs(shape, FP16, weight_std=weight_std)
    grad = make_grad(inputs, FP16) / 16
    assert_right(inputs, FP16, grad=grad, patch_size=7)


@pytest.mark.parametrize("shape", [CPSA_PATCH_COUNTS[3], CPSA_PATCH_COUNTS[12]], ids=str)
def test_scores_that_overflow_exp(shape):
    inputs = make_inputs(shape, FP32)
    inputs["x"] *= 100
    assert_right(inputs, FP32, patch_size=7)
    inputs["x"] *= 1e-6
    assert_right(inputs, FP32, patch_size=7)


@pytest.mark.parametrize("missing", ["qkv_bias", "proj_bias"])
def test_missing_bias_and_explicit_scale(missing):
    inputs = make_inputs(cpsa_shape(14, 21, 5), FP16)
    inputs[missing] = None
    assert_right(inputs, FP16, patch_size=7, scale=0.5)


def test_any_strides():
    shape = cpsa_shape(14, 14, 6, batch=2)
    inputs = make_inputs(shape, FP16)
    permuted = inputs["x"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    surroundings = inputs["x"].new_full((4, 16, 16, 9), float("nan"))
    surroundings[1:3, 1:15, 1:15, 2:8] = inputs["x"]
    grad = torch.randn(6, device=DEVICE).to(FP16).expand(inputs["x"].shape)
    for x in (inputs["x"], permuted, surroundings[1:3, 1:15, 1:15, 2:8]):
        assert_right({**inputs, "x": x}, FP16, grad=grad, patch_size=7)


@pytest.mark.parametrize("shape", [CPSA_PATCH_COUNTS[3], CPSA_PATCH_COUNTS[12]], ids=str)
def test_nothing_is_read_beside_the_inputs(shape):
    inputs = make_inputs(shape, FP16)
    surroundings = inputs["x"].new_full((shape.batch + 2, *inputs["x"].shape[1:]), float("nan"))
    surroundings[1:-1] = inputs["x"]
    assert_right({**inputs, "x": surroundings[1:-1]}, FP16, patch_size=7)


@pytest.mark.parametrize(
    ("shape", "architecture"),
    [
        (cpsa_shape(14, 14, 17, batch=3), "sm_90"),  # fetches the next tile ahead
        (cpsa_shape(35, 35, 9), "sm_90"),  # takes every second tile
        (cpsa_shape(14, 14, 17, batch=3), "sm_80"),  # in three passes
        (cpsa_shape(63, 70, 1), "sm_80"),
    ],
    ids=str,
)
def test_any_chunking_gives_the_same_bits(shape, architecture, monkeypatch):
    launch_as_on(architecture, monkeypatch)
    inputs = make_inputs(shape, FP16)
    grad = make_grad(inputs, FP16)

    def run():
        return with_gradients(kernels(dtype=FP16), inputs, grad, FP16, patch_size=7)

    first = run()
    for actual, expected in zip(run(), first, strict=True):
        assert torch.equal(actual, expected)
    monkeypatch.setattr("catkernels.kernels.cpsa.launch.Problem.wide", True)
    for module in ("backward", "flash_backward"):
        monkeypatch.setattr(f"catkernels.kernels.cpsa.{module}.PROGRAMS", 2)
    out, dx, *_ = run()
    assert torch.equal(out, first[0])
    assert torch.equal(dx, first[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("shape", [(14, 14, 17), (63, 70, 1)], ids=["map", "flash"])
def test_what_is_not_finite_stays_in_its_image(shape, value, monkeypatch):
    # in one program, whose tiles of both images come one after the other
    launch_as_on("sm_90", monkeypatch)
    monkeypatch.setattr("catkernels.kernels.cpsa.backward.PROGRAMS", 1)
    inputs = make_inputs(cpsa_shape(*shape, batch=2), FP16)
    grad = make_grad(inputs, FP16)

    def run(attention):
        return with_gradients(attention, inputs, grad, FP16, patch_size=7)

    clean, _ = run(kernels(dtype=FP16))[:2], inputs["x"][0, 3, 5, 0].fill_(value)
    results = run(kernels(dtype=FP16))
    for actual, expected in zip(results, clean, strict=False):
        assert torch.equal(actual[1], expected[1])
    # what the reference's sums over all images are, these are
    for name, actual, expected in zip(
        NAMES[2:], results[2:], run(reference.cpsa_attention)[2:], strict=True
    ):
        assert actual.isfinite().all() == expected.isfinite().all(), name


@pytest.mark.full
def test_more_sequences_than_a_grid_axis_holds():
    inputs = make_inputs(cpsa_shape(1, 1, 768, patch_size=1, batch=128), FP16)
    x = inputs.pop("x")
    with torch.no_grad():
        whole, *halves = (
            kernels(dtype=FP16)(x=part, **inputs, patch_size=1) for part in (x, *x.split(64))
        )
    assert x.shape[0] * x.shape[3] == 98_304
    assert torch.equal(whole, torch.cat(halves))


def test_an_empty_batch_launches_nothing(launches):
    inputs = make_inputs(cpsa_shape(14, 14, 3, batch=0), FP32)
    out, dx, *weight_grads = with_gradients(
        kernels(dtype=FP32), inputs, make_grad(inputs, FP32), FP32, patch_size=7
    )
    assert out.shape == dx.shape == (0, 14, 14, 3)
    assert all(torch.count_nonzero(g) == 0 for g in weight_grads)
    assert not launches

    kernels(dtype=FP32)(**make_inputs(cpsa_shape(14, 14, 3), FP32), patch_size=7)
    assert launches


@pytest.mark.parametrize(
    "shape", [CPSA_PATCH_COUNTS[4], CPSA_PATCH_COUNTS[8], CPSA_PATCH_COUNTS[12]], ids=str
)
def test_float32_map_is_rounded_in_the_kernel(shape):
    """Under autocast the map and the weights are float32, the products and the output half."""
    inputs = make_inputs(shape, FP32)
    grad = make_grad(inputs, FP16)

    def autocast_reference(**arguments):
        with torch.autocast(DEVICE.type, FP16):
            return reference.cpsa_attention(**arguments)

    actual = with_gradients(kernels(dtype=FP16), inputs, grad, FP32, patch_size=7)
    same_dtype = with_gradients(autocast_reference, inputs, grad, FP32, patch_size=7)
    float64 = with_gradients(reference.cpsa_attention, inputs, grad, torch.float64, patch_size=7)
    assert actual[0].dtype == FP16
    for name, *results in zip(NAMES, actual, same_dtype, float64, strict=True):
        assert name == "out" or results[0].dtype == FP32
        # the kernels round the folded weights once; eager rounds each of the four
        assert_within_error_budget(results[0].to(FP16), results[1].to(FP16), results[2], name)


def test_folding_is_more_accurate():
    inputs = make_inputs(cpsa_shape(28, 28, 16), FP16)
    grad = make_grad(inputs, FP16)
    folded = with_gradients(kernels(dtype=FP16), inputs, grad, FP16, patch_size=7)
    unfolded = with_gradients(reference.cpsa_attention, inputs, grad, FP16, patch_size=7)
    truth = with_gradients(reference.cpsa_attention, inputs, grad, torch.float64, patch_size=7)
    for name, *results, expected in zip(NAMES, folded, unfolded, truth, strict=True):
        errors = [(t.double() - expected).square().mean() for t in results]
        assert errors[0] <= 1.05 * errors[1], name


@DTYPES
@pytest.mark.parametrize(
    "shape",
    [CPSA_PATCH_COUNTS[0], CPSA_PATCH_COUNTS[3], CPSA_PATCH_COUNTS[8], CPSA_PATCH_COUNTS[12]],
    ids=lambda s: f"P{s.num_patches}",
)
def test_dropout(shape, dtype, monkeypatch):
    if DEVICE.type == "cpu":
        # all gradients in one pass of half precision, in three of float32
        launch_as_on("sm_80" if dtype == FP32 else "sm_90", monkeypatch)
    seed, dropout_p = 0x1234_5678_9ABC_DEF0, 0.25
    patches = shape.num_patches
    keep = kept(seed, dropout_p, patches, patches, shape.channels, shape.batch)
    assert 0.7 < keep.double().mean() < 0.8
    with SameDropout(seed, keep):
        assert_right(make_inputs(shape, dtype), dtype, patch_size=7, dropout_p=dropout_p)


def test_dropout_draws_anew_and_follows_the_generator():
    inputs = make_inputs(cpsa_shape(14, 14, 3), FP32)

    def run():
        return kernels(dtype=FP32)(**inputs, patch_size=7, dropout_p=0.5)

    torch.manual_seed(1)
    first, second = run(), run()
    torch.manual_seed(1)
    assert torch.equal(run(), first)
    assert not torch.equal(first, second)
