"""CPSA as an operator: what is differentiated, traced, exported, counted and refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from cpsa_cases import (
    DEVICE,
    FP16,
    FP32,
    NAMES,
    kernels,
    make_grad,
    make_inputs,
    with_gradients,
)
from torch.utils.flop_counter import FlopCounterMode

from catkernels import reference
from catkernels.cases import cpsa_shape
from catkernels.ops import cpsa, limits

pytest.importorskip("triton")

pytestmark = pytest.mark.usefixtures(
    "round_to_nearest_bf16", "poisoned_memory", "launches", "tf32_on_gpus"
)


@pytest.mark.parametrize(
    "shape",
    [cpsa_shape(14, 14, 5), cpsa_shape(35, 35, 2), cpsa_shape(63, 70, 1)],
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
    inputs = make_inputs(cpsa_shape(7, 14, 2), FP32)
    for name, tensor in inputs.items():
        tensor.requires_grad_(only in (None, name))
    out = kernels(dtype=FP32)(**inputs, patch_size=7)
    # as in a gradient penalty: the incoming gradient is a constant
    (dx,) = torch.autograd.grad(out.sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        dx.square().sum().backward()


def test_function_transforms():
    inputs = make_inputs(cpsa_shape(7, 14, 2), FP32)
    x = inputs.pop("x")

    def loss(x):
        return attend(x).square().sum()

    def attend(x):
        return kernels(dtype=FP32)(x=x, **inputs, patch_size=7)

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    assert torch.equal(torch.func.grad(loss)(x), leaf.grad)
    with torch.no_grad():
        assert torch.equal(torch.func.vmap(attend)(x[None]), attend(x)[None])


@pytest.mark.parametrize("patches", [1, 2])
def test_operators_are_well_formed(patches):
    inputs = make_inputs(cpsa_shape(2, 2 * patches, 3, patch_size=2), FP16)
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
        inputs = make_inputs(cpsa_shape(6, 6, 3, patch_size=3, batch=batch), FP16)
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
    inputs = make_inputs(cpsa_shape(6, 6, 3, patch_size=3), FP16)

    class Layer(torch.nn.Module):
        def forward(self, **leaves):
            return kernels(dtype=FP16)(**leaves, patch_size=3)

    exported = torch.export.export(Layer(), (), inputs)
    with torch.no_grad():
        expected = Layer()(**inputs)
        assert torch.equal(exported.module()(**inputs), expected)


@pytest.mark.parametrize(("side", "forward", "backward"), [(7, 1, 2), (14, 2, 5)])
def test_flops_are_counted(side, forward, backward):
    inputs = make_inputs(cpsa_shape(side, side, 3, batch=2), FP32)
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
    kernels(dtype=FP16)(**make_inputs(cpsa_shape(14, 14, 1), FP16), patch_size=7)
    assert "float64" in reasons(dtype=torch.float64)[0]
    assert "patch sizes up to 8, not 9" in reasons(patch_size=9)[0]
    assert len(reasons(device=torch.device("meta"), dtype=torch.float64, patch_size=9)) == 3

    # exact float32 products are only too large for a GPU
    monkeypatch.setattr(cpsa, "interpreting", lambda: False)
    monkeypatch.setattr(limits, "device_reasons", lambda device: [])
    monkeypatch.setattr(cpsa, "allows_tf32", lambda: False)
    assert "TF32" in reasons(dtype=FP32)[0]
    assert reasons(dtype=FP32, num_patches=1) == reasons(dtype=FP32, needs_grad=False) == []
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for name, served in (("gfx942:sramecc+:xnack-", True), ("gfx1100", False)):
        gpu = SimpleNamespace(gcnArchName=name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, gpu=gpu: gpu)
        assert bool(reasons(dtype=FP32, device=torch.device("cuda", 0))) != served
