"""Patched models in mixed and half precision, and what decides how float32 is multiplied."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from tiny_models import ONE_STAGE
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import catkernels
from catkernels import official
from catkernels.accuracy import assert_draws_within_error_budget, assert_within_error_budget
from catkernels.cases import Shape, make_ipsa_inputs
from catkernels.ops import cpsa, limits

HALVES = [torch.float16, torch.bfloat16]
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)
backends = pytest.mark.parametrize("backend", ["reference", "triton"])


def build(device: torch.device) -> tuple[nn.Module, torch.Tensor]:
    """One stage in the official structure that kernels serve, and an image of two patches."""
    options = {"img_size": 28, "patch_size": 7, "ape": True, "drop_path_rate": 0.0}
    model = official.CAT(**(ONE_STAGE | options))
    return model.to(device), torch.randn(1, 3, 28, 50, device=device)


def patched(model: nn.Module, backend: str) -> nn.Module:
    model = deepcopy(model)
    catkernels.patch(model, backend=backend)
    return model


def outputs_and_gradients(model, images):
    (output,) = model(images)
    output.square().mean().backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters()}


def compare(actual, same_dtype, double) -> None:
    results = (actual, same_dtype, double)
    assert_within_error_budget(*(output for output, _ in results))
    draws = (
        {".".join(name.split(".")[-2:]): tuple(gradients[name] for _, gradients in results)}
        for name in actual[1]
        # nothing but rounding: all channels share this bias, and every norm takes it away again
        if not name.endswith("cpsa_blocks.0.attn.proj.bias")
    )
    assert_draws_within_error_budget(draws, "gradients")


@backends
@halves
@pytest.mark.usefixtures("round_to_nearest_bf16")
def test_training_with_half_parameters(backend, dtype, device):
    model, images = build(device)
    model, images = model.to(dtype), images.to(dtype)
    double = outputs_and_gradients(deepcopy(model).double(), images.double())
    results = [outputs_and_gradients(m, images) for m in (patched(model, backend), model)]
    assert results[0][0].dtype == dtype
    compare(*results, double)


def scaled_step(model: nn.Module, images: torch.Tensor, init_scale: float):
    """One step under autocast in float16 and a `GradScaler`; its scale afterwards."""
    scaler = torch.amp.GradScaler(images.device.type, init_scale=init_scale)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast(images.device.type, torch.float16):
        (output,) = model(images)
        loss = output.float().square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    return (output.detach(), {n: p.grad for n, p in model.named_parameters()}), scaler.get_scale()


@backends
def test_a_step_with_a_gradient_scaler(backend, device):
    model, images = build(device)
    double = outputs_and_gradients(deepcopy(model).double(), images.double())
    (actual, scale), (same, its_scale) = (
        scaled_step(m, images, 2.0**10) for m in (patched(model, backend), deepcopy(model))
    )
    assert scale == its_scale == 2.0**10
    compare(actual, same, double)


# interpreted kernels compute in NumPy, which warns of what a GPU does in silence
@pytest.mark.filterwarnings("ignore:(invalid|overflow).*:RuntimeWarning")
@backends
def test_a_gradient_that_overflows_skips_the_step(backend, device):
    model, images = build(device)
    for candidate in (patched(model, backend), deepcopy(model)):
        _, scale = scaled_step(candidate, images, 2.0**40)
        assert scale == 2.0**39
        for name, parameter in model.named_parameters():
            assert torch.equal(candidate.get_parameter(name), parameter), name


LAYERS = {
    "IPSA": lambda: catkernels.IPSA(16, 7, 1),
    "CPSA": lambda: catkernels.CPSA(7),
    "CAT": lambda: catkernels.CAT(img_size=28, embed_dim=16, depths=(1,), num_heads=(1,)),
    "a patched CAT": lambda: patched(build(torch.device("cpu"))[0], "auto"),
}


@halves
@pytest.mark.parametrize("name", LAYERS)
def test_half_inputs_of_float32_parameters(name, dtype):
    """As `nn.Linear` has it: an error, unless under autocast."""
    module = LAYERS[name]().eval()
    x = torch.randn(2, 3, 28, 28) if "CAT" in name else torch.randn(2, 7, 14, 16)
    for context in (nullcontext, torch.inference_mode):
        with context(), pytest.raises((RuntimeError, TypeError), match=r"dtype|type .* same"):
            module(x.to(dtype))
        with context(), torch.autocast("cpu", dtype):
            result, expected = module(x.to(dtype)), module(x.to(dtype).float())
        torch.testing.assert_close(result, expected)


@halves
def test_autocast_can_be_left_for_a_while(dtype):
    model, images = build(torch.device("cpu"))
    model = patched(model, "reference")
    expected = outputs_and_gradients(model, images)
    model.zero_grad()
    with torch.autocast("cpu", dtype), torch.autocast("cpu", enabled=False):
        actual = outputs_and_gradients(model, images)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_what_autocast_keeps_for_later_passes_keeps_its_gradients(device):
    """It casts a weight once for a whole region, passes without gradients included."""
    model, images = build(device)
    model = patched(model, "triton")
    with torch.autocast(device.type, torch.bfloat16):
        expected = outputs_and_gradients(model, images)
    model.zero_grad()
    with torch.autocast(device.type, torch.bfloat16):
        with torch.no_grad():
            model(images)
        actual = outputs_and_gradients(model, images)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@halves
def test_autocast_for_a_gpu_reaches_the_kernels(dtype):
    """By tensors that only claim to be on a GPU: on one, "auto" chooses the operators."""
    pytest.importorskip("triton")
    inputs = make_ipsa_inputs(Shape("padded", 2, 9, 16, 16, 1))
    metas = {name: tensor.to("meta") for name, tensor in inputs.items()}
    with FakeTensorMode() as mode, torch.no_grad():
        fakes = {n: FakeTensor(mode, t, torch.device("cuda", 0)) for n, t in metas.items()}

        def attend():
            output = catkernels.ipsa_attention(**fakes, num_heads=1, patch_size=7)
            assert output.device.type == "cuda"
            return output.dtype

        assert not catkernels.unsupported_reasons(
            catkernels.ipsa_attention, **fakes, num_heads=1, patch_size=7
        )
        with torch.autocast("cpu", dtype):
            assert attend() == torch.float32
        default = torch.get_autocast_dtype("cuda")
        torch.set_autocast_dtype("cuda", dtype)
        torch.set_autocast_enabled("cuda", True)
        try:
            assert attend() == dtype
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.set_autocast_dtype("cuda", default)


@pytest.mark.parametrize("name", ["CAT", "a patched CAT"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_images_and_parameters_in_channels_last(name, memory_format):
    """Images whose channels are innermost, and parameters that stay or follow."""
    model = LAYERS[name]().double().eval()
    images = torch.randn(2, 3, 28, 28, dtype=torch.float64)

    def results(images):
        outputs = model(images)
        output = outputs[0] if isinstance(outputs, tuple) else outputs
        return output, *torch.autograd.grad(output.square().sum(), tuple(model.parameters()))

    expected = results(images)
    model.to(memory_format=memory_format)
    images = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(results(images), expected)
    with torch.inference_mode():
        outputs = model(images)
    inferred = outputs[0] if isinstance(outputs, tuple) else outputs
    torch.testing.assert_close(inferred, expected[0])


MATMUL = torch.backends.cuda.matmul
SETTINGS = {
    "highest": (lambda: torch.set_float32_matmul_precision("highest"), "ieee"),
    "high": (lambda: torch.set_float32_matmul_precision("high"), "tf32"),
    "medium": (lambda: torch.set_float32_matmul_precision("medium"), "tf32"),
    "allow_tf32": (lambda: setattr(MATMUL, "allow_tf32", True), "tf32"),
    "no allow_tf32": (lambda: setattr(MATMUL, "allow_tf32", False), "ieee"),
    "of matmul": (lambda: setattr(MATMUL, "fp32_precision", "tf32"), "tf32"),
    "of matmul, exact": (lambda: setattr(MATMUL, "fp32_precision", "ieee"), "ieee"),
    "of everything": (lambda: setattr(torch.backends, "fp32_precision", "tf32"), "tf32"),
    "of nothing": (lambda: None, "ieee"),
}


@pytest.fixture
def precision_put_back():
    yield
    torch.set_float32_matmul_precision("highest")
    MATMUL.fp32_precision = torch.backends.fp32_precision = "none"


@pytest.mark.usefixtures("precision_put_back")
@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_of_float32_products_reaches_the_kernels(name, monkeypatch):
    """PyTorch's old and new ones, which it refuses to read as the other kind once set."""
    pytest.importorskip("triton")
    from catkernels.kernels.launch import dot_precision

    change, expected = SETTINGS[name]
    change()
    assert dot_precision(torch.float32) == expected
    assert dot_precision(torch.bfloat16) == "ieee"

    # as on a GPU of NVIDIA's, where exact products of many patches are left to the reference
    monkeypatch.setattr(cpsa, "interpreting", lambda: False)
    monkeypatch.setattr(limits, "device_reasons", lambda device: [])
    call = {"device": torch.device("cuda"), "dtype": torch.float32, "patch_size": 7}
    reasons = cpsa.unsupported_reasons(**call, num_patches=4)
    assert ["TF32" in reason for reason in reasons] == [True] * (expected == "ieee")
