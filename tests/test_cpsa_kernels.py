"""CPSA's kernels against float64: every launch of every architecture, forward and backward."""

from __future__ import annotations

import random

import pytest
import torch
from interpreter import kept
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from catkernels import reference
from catkernels.ops import cpsa
from catkernels.testing import (
    Shape,
    assert_draws_within_error_budget,
    assert_within_error_budget,
    make_cpsa_inputs,
)

pytest.importorskip("triton")

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=["fp32", "fp16", "bf16"])
NAMES = ("out", "x", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias")

pytestmark = pytest.mark.usefixtures("round_to_nearest_bf16", "poisoned_memory", "launches")


DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def make_shape(height: int, width: int, channels: int, patch_size: int = 7, batch: int = 1):
    name = f"b{batch}-{height}x{width}-c{channels}-n{patch_size}"
    return Shape(name, batch, height, width, channels, num_heads=1, patch_size=patch_size)


# P = 1, 2, 3, 4, 6, 9, 12, 16, 25, 49, 56, 64, 90, 100
PATCH_COUNTS = [
    make_shape(7, 7, 70, batch=2),
    make_shape(7, 14, 40),
    make_shape(21, 7, 16),
    make_shape(14, 14, 17, batch=2),
    make_shape(14, 21, 8),
    make_shape(21, 21, 9),
    make_shape(21, 28, 8),
    make_shape(28, 28, 11),
    make_shape(35, 35, 3),
    make_shape(49, 49, 2),
    make_shape(49, 56, 2),
    make_shape(56, 56, 9),
    make_shape(63, 70, 2),
    make_shape(70, 70, 1),
]
# 512 x 512 and 800 x 1333 images: the loops over blocks of queries and keys
LARGE = [make_shape(133, 133, 1), make_shape(200, 334, 1)]
# 1x1 maps, maps one patch wide, padding on both sides, every patch size, C = 1
ODD_SHAPES = [
    make_shape(1, 1, 3),
    make_shape(1, 30, 2),
    make_shape(30, 3, 9),
    make_shape(20, 13, 5, batch=2),
    make_shape(50, 64, 2),
    make_shape(3, 5, 64, patch_size=1),
    make_shape(6, 7, 9, patch_size=2),
    make_shape(9, 9, 8, patch_size=3),
    make_shape(8, 8, 1, patch_size=4),
    make_shape(11, 20, 3, patch_size=5),
    make_shape(12, 12, 5, patch_size=6),
    make_shape(17, 16, 4, patch_size=8),
]


def make_inputs(shape: Shape, dtype: torch.dtype, **options) -> dict[str, Tensor]:
    return make_cpsa_inputs(shape, dtype, DEVICE, **options)


def make_grad(inputs: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    return torch.randn(inputs["x"].shape, device=DEVICE).to(dtype)


@pytest.fixture(params=["sm_80", "sm_90", "gfx9"])
def architecture(request, monkeypatch) -> str:
    """Kernels are launched here as on this architecture."""
    monkeypatch.setattr("catkernels.kernels.cpsa_launch.architecture", lambda _: request.param)
    return request.param


def with_gradients(attention, inputs: dict[str, Tensor], grad: Tensor, dtype, **options):
    """The output and the five gradients of ``attention`` with its inputs as ``dtype``."""
    leaves = {
        name: None if t is None else t.detach().to(dtype).requires_grad_()
        for name, t in inputs.items()
    }
    out = attention(**leaves, **options)
    used = [t for t in leaves.values() if t is not None]
    grads = iter(torch.autograd.grad(out, used, grad.to(out.dtype), materialize_grads=True))
    return [out, *(None if t is None else next(grads) for t in leaves.values())]


def kernels(*, dtype: torch.dtype):
    """`cpsa_attention` by the kernels, computing in ``dtype``."""

    def attention(*, patch_size: int, scale: float | None = None, dropout_p: float = 0.0, **leaves):
        scale = 1 / patch_size if scale is None else scale
        options = {"patch_size": patch_size, "scale": scale, "dropout_p": dropout_p}
        return cpsa.cpsa_attention(**leaves, **options, dtype=dtype)

    return attention


def assert_right(inputs: dict[str, Tensor], dtype: torch.dtype, *, grad=None, **options) -> None:
    """Assert that the kernels' output and gradients are within the error budget."""
    for name, results in compared(inputs, dtype, grad=grad, **options).items():
        assert_within_error_budget(*results, name)


def compared(
    inputs: dict[str, Tensor], dtype: torch.dtype, *, grad=None, **options
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Output and gradients by the kernels, by plain PyTorch in ``dtype``, and in float64."""
    if grad is None:
        grad = make_grad(inputs, dtype)
    actual = with_gradients(kernels(dtype=dtype), inputs, grad, dtype, **options)
    same_dtype = with_gradients(reference.cpsa_attention, inputs, grad, dtype, **options)
    float64 = with_gradients(reference.cpsa_attention, inputs, grad, torch.float64, **options)
    assert all(result is None or result.dtype == dtype for result in actual)
    everything = zip(NAMES, actual, same_dtype, float64, strict=True)
    return {name: tuple(results) for name, *results in everything if results[0] is not None}


def every_number_of_patches():
    """Each number of patches with one dtype, by turns; `--full` takes the other two as well."""
    for turn, shape in enumerate(PATCH_COUNTS):
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
@pytest.mark.parametrize("shape", LARGE, ids=lambda s: f"P{s.num_patches}")
def test_large_numbers_of_patches(shape, dtype):
    assert_right(make_inputs(shape, dtype), dtype, patch_size=7)


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_odd_shapes(shape):
    assert_right(make_inputs(shape, FP16), FP16, patch_size=shape.patch_size)


@pytest.mark.parametrize(
    "shape",
    [
        make_shape(7, 7, 9),
        make_shape(14, 14, 17),
        make_shape(28, 28, 9),
        make_shape(35, 35, 3),
        make_shape(56, 56, 3),
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
        patch_size = generator.randint(1, 8)
        height, width = (generator.randint(1, 9 * patch_size) for _ in range(2))
        shape = make_shape(height, width, generator.randint(1, 9), patch_size)
        inputs = make_inputs(shape, dtype, seed=generator.randint(0, 2**31))
        return compared(inputs, dtype, patch_size=patch_size)

    # many at a time: a gradient of few weights may be exact by luck in plain PyTorch
    for _ in range(25 if full else 1):
        assert_draws_within_error_budget(
            [draw() for _ in range(20 if full else 5)], "random shapes"
        )


@pytest.mark.parametrize("weight_std", [1e-3, 3e-2, 1.0, 3.0])
@pytest.mark.parametrize("shape", [make_shape(14, 14, 64, batch=2), PATCH_COUNTS[12]], ids=str)
def test_weights_of_any_size(weight_std, shape):
    inputs = make_inputs(shape, FP16, weight_std=weight_std)
    grad = make_grad(inputs, FP16) / 16
    assert_right(inputs, FP16, grad=grad, patch_size=7)


@pytest.mark.parametrize("shape", [PATCH_COUNTS[3], PATCH_COUNTS[12]], ids=str)
def test_scores_that_overflow_exp(shape):
    inputs = make_inputs(shape, FP32)
    inputs["x"] *= 100
    assert_right(inputs, FP32, patch_size=7)
    inputs["x"] *= 1e-6
    assert_right(inputs, FP32, patch_size=7)


@pytest.mark.parametrize("missing", ["qkv_bias", "proj_bias"])
def test_missing_bias_and_explicit_scale(missing):
    inputs = make_inputs(make_shape(14, 21, 5), FP16)
    inputs[missing] = None
    assert_right(inputs, FP16, patch_size=7, scale=0.5)


def test_any_strides():
    shape = make_shape(14, 14, 6, batch=2)
    inputs = make_inputs(shape, FP16)
    permuted = inputs["x"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    surroundings = inputs["x"].new_full((4, 16, 16, 9), float("nan"))
    surroundings[1:3, 1:15, 1:15, 2:8] = inputs["x"]
    grad = torch.randn(6, device=DEVICE).to(FP16).expand(inputs["x"].shape)
    for x in (inputs["x"], permuted, surroundings[1:3, 1:15, 1:15, 2:8]):
        assert_right({**inputs, "x": x}, FP16, grad=grad, patch_size=7)


@pytest.mark.parametrize("shape", [PATCH_COUNTS[3], PATCH_COUNTS[12]], ids=str)
def test_nothing_is_read_beside_the_inputs(shape):
    inputs = make_inputs(shape, FP16)
    surroundings = inputs["x"].new_full((shape.batch + 2, *inputs["x"].shape[1:]), float("nan"))
    surroundings[1:-1] = inputs["x"]
    assert_right({**inputs, "x": surroundings[1:-1]}, FP16, patch_size=7)


@pytest.mark.parametrize(
    "shape",
    [make_shape(14, 14, 17, batch=2), make_shape(35, 35, 3), make_shape(63, 70, 1)],
    ids=lambda s: f"P{s.num_patches}",
)
def test_any_chunking_gives_the_same_bits(shape, monkeypatch):
    inputs = make_inputs(shape, FP16)
    grad = make_grad(inputs, FP16)

    def run():
        return with_gradients(kernels(dtype=FP16), inputs, grad, FP16, patch_size=7)

    first = run()
    for actual, expected in zip(run(), first, strict=True):
        assert torch.equal(actual, expected)
    monkeypatch.setattr("catkernels.kernels.cpsa_launch.Problem.wide", True)
    for module in ("cpsa_backward", "cpsa_flash_backward"):
        monkeypatch.setattr(f"catkernels.kernels.{module}.PROGRAMS", 2)
    out, dx, *_ = run()
    assert torch.equal(out, first[0])
    assert torch.equal(dx, first[1])


@pytest.mark.full
def test_more_sequences_than_a_grid_axis_holds():
    inputs = make_inputs(make_shape(1, 1, 768, patch_size=1, batch=128), FP16)
    x = inputs.pop("x")
    with torch.no_grad():
        whole, *halves = (
            kernels(dtype=FP16)(x=part, **inputs, patch_size=1) for part in (x, *x.split(64))
        )
    assert x.shape[0] * x.shape[3] == 98_304
    assert torch.equal(whole, torch.cat(halves))


def test_an_empty_batch_launches_nothing(launches):
    inputs = make_inputs(make_shape(14, 14, 3, batch=0), FP32)
    out, dx, *weight_grads = with_gradients(
        kernels(dtype=FP32), inputs, make_grad(inputs, FP32), FP32, patch_size=7
    )
    assert out.shape == dx.shape == (0, 14, 14, 3)
    assert all(torch.count_nonzero(g) == 0 for g in weight_grads)
    assert not launches

    kernels(dtype=FP32)(**make_inputs(make_shape(14, 14, 3), FP32), patch_size=7)
    assert launches


@pytest.mark.parametrize("shape", [PATCH_COUNTS[4], PATCH_COUNTS[8], PATCH_COUNTS[12]], ids=str)
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
    inputs = make_inputs(make_shape(28, 28, 16), FP16)
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
    [PATCH_COUNTS[0], PATCH_COUNTS[3], PATCH_COUNTS[8], PATCH_COUNTS[12]],
    ids=lambda s: f"P{s.num_patches}",
)
def test_dropout(shape, dtype, monkeypatch):
    seed, dropout_p = 0x1234_5678_9ABC_DEF0, 0.25
    monkeypatch.setattr(torch, "randint", lambda *a, **k: torch.tensor([seed], device=DEVICE))
    patches = shape.num_patches
    keep = kept(seed, dropout_p, patches, patches, shape.channels, shape.batch).to(DEVICE)
    assert 0.7 < keep.double().mean() < 0.8
    monkeypatch.setattr(
        reference.F, "dropout", lambda attention, p: attention * keep.to(attention.dtype) / (1 - p)
    )
    assert_right(make_inputs(shape, dtype), dtype, patch_size=7, dropout_p=dropout_p)


def test_dropout_draws_anew_and_follows_the_generator():
    inputs = make_inputs(make_shape(14, 14, 3), FP32)

    def run():
        return kernels(dtype=FP32)(**inputs, patch_size=7, dropout_p=0.5)

    torch.manual_seed(1)
    first, second = run(), run()
    torch.manual_seed(1)
    assert torch.equal(run(), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "shape",
    [make_shape(14, 14, 5), make_shape(35, 35, 2), make_shape(63, 70, 1)],
    ids=lambda s: f"P{s.num_patches}",
)
@pytest.mark.parametrize("wanted", ["x", "proj_weight"])
def test_only_the_gradients_asked_for(shape, wanted):
    inputs = make_inputs(shape, FP16)
    grad = make_grad(inputs, FP16)
    everything = with_gradients(kernels(dtype=FP16), inputs, grad, FP16, patch_size=7)
    inputs[wanted].requires_grad_()
    out = kernels(dtype=FP16)(**inputs, patch_size=7)
    (actual,) = torch.autograd.grad(out, inputs[wanted], grad)
    assert torch.equal(actual, everything[NAMES.index(wanted)])


@pytest.mark.parametrize("only", [None, "x"])
def test_second_derivatives_raise(only):
    inputs = make_inputs(make_shape(7, 14, 2), FP32)
    for name, tensor in inputs.items():
        tensor.requires_grad_(only in (None, name))
    out = kernels(dtype=FP32)(**inputs, patch_size=7)
    # as in a gradient penalty: the incoming gradient is a constant
    (dx,) = torch.autograd.grad(out.sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        dx.square().sum().backward()


def test_function_transforms():
    inputs = make_inputs(make_shape(7, 14, 2), FP32)
    x = inputs.pop("x")

    def loss(x):
        return kernels(dtype=FP32)(x=x, **inputs, patch_size=7).square().sum()

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    assert torch.equal(torch.func.grad(loss)(x), leaf.grad)
    with torch.no_grad():
        assert torch.equal(torch.func.vmap(loss)(x[None]), loss(x)[None])
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(torch.func.grad(loss))(x[None])


@pytest.mark.parametrize("patches", [1, 2])
def test_operators_are_well_formed(patches):
    inputs = make_inputs(make_shape(2, 2 * patches, 3, patch_size=2), FP16)
    folded = reference.fold_weights(
        inputs["qkv_weight"], inputs["qkv_bias"], inputs["proj_weight"], 1 / 2
    )
    bias, seed = inputs["proj_bias"].float(), torch.tensor([1], device=DEVICE)
    x, grad = inputs["x"], make_grad(inputs, FP16)
    operators = torch.ops.catkernels
    for dropout in ((None, 2, 0.0), (seed, 2, 0.5)):
        torch.library.opcheck(operators.cpsa_forward.default, (x, folded, bias, *dropout, FP16))
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(operators.cpsa_backward.default, (grad, x, folded, *dropout, *needs))


def test_compiles_to_one_graph_for_all_batch_sizes():
    attention = kernels(dtype=FP16)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")

    def check(batch: int) -> None:
        inputs = make_inputs(make_shape(6, 6, 3, patch_size=3, batch=batch), FP16)
        grad = make_grad(inputs, FP16)
        expected = with_gradients(attention, inputs, grad, FP16, patch_size=3)
        actual = with_gradients(compiled, inputs, grad, FP16, patch_size=3)
        for name, a, b in zip(NAMES, actual, expected, strict=True):
            torch.testing.assert_close(a, b, msg=name)

    check(batch=2)
    check(batch=3)
    with torch.compiler.set_stance("fail_on_recompile"):
        check(batch=5)


def test_exports():
    inputs = make_inputs(make_shape(6, 6, 3, patch_size=3), FP16)

    class Layer(torch.nn.Module):
        def forward(self, **leaves):
            return kernels(dtype=FP16)(**leaves, patch_size=3)

    exported = torch.export.export(Layer(), (), inputs)
    with torch.no_grad():
        expected = Layer()(**inputs)
        assert torch.equal(exported.module()(**inputs), expected)


@pytest.mark.parametrize(("side", "forward", "backward"), [(7, 1, 2), (14, 2, 5)])
def test_flops_are_counted(side, forward, backward):
    inputs = make_inputs(make_shape(side, side, 3, batch=2), FP32)
    patches, sequences, pixels = (side // 7) ** 2, 6, 49
    x = inputs.pop("x").requires_grad_()
    with FlopCounterMode(display=False) as counter:
        kernels(dtype=FP32)(x=x, **inputs, patch_size=7).sum().backward()
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    by_matrix = 2 * sequences * patches * pixels**2
    by_tokens = 2 * sequences * patches**2 * pixels if patches > 1 else 0
    assert counts["catkernels.cpsa_forward"] == forward * by_matrix + 2 * by_tokens
    assert counts["catkernels.cpsa_backward"] == backward * by_matrix + 6 * by_tokens


def test_unsupported_reasons_name_each_reason(monkeypatch):
    def reasons(**changes):
        call = {"device": DEVICE, "dtype": FP16, "patch_size": 7, "num_patches": 4}
        return cpsa.unsupported_reasons(**call | changes)

    assert reasons() == []
    kernels(dtype=FP16)(**make_inputs(make_shape(14, 14, 1), FP16), patch_size=7)
    assert "float64" in reasons(dtype=torch.float64)[0]
    assert "patch sizes up to 8, not 9" in reasons(patch_size=9)[0]
    assert len(reasons(device=torch.device("meta"), dtype=torch.float64, patch_size=9)) == 3

    # exact float32 products are only too large for a GPU
    monkeypatch.setattr(cpsa, "interpreting", lambda: False)
    monkeypatch.setattr(cpsa, "device_reasons", lambda device: [])
    assert "TF32" in reasons(dtype=FP32)[0]
    assert reasons(dtype=FP32, num_patches=1) == reasons(dtype=FP32, needs_grad=False) == []
