"""CPSA as an operator: what is differentiated, traced, exported, counted and refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import FP16, FP32
from torch.utils.flop_counter import FlopCounterMode

from catkernels import reference
from catkernels.cases import cpsa_case, random_grad, results
from catkernels.ops import cpsa, limits

pytestmark = pytest.mark.usefixtures(
    "round_to_nearest_bf16", "poisoned_memory", "launches", "tf32_on_gpus"
)


@pytest.mark.parametrize(
    "case",
    [cpsa_case(14, 14, 5), cpsa_case(35, 35, 2), cpsa_case(63, 70, 1)],
    ids=lambda case: f"P{case.shape.num_patches}",
)
@pytest.mark.parametrize("wanted", ["x", "proj_weight"])
def test_only_the_gradients_asked_for(case, wanted, device):
    inputs = case.inputs(FP16, device)
    grad_out = random_grad(case.shape, inputs["x"])
    everything = results(case.attend, inputs, grad_out)
    inputs[wanted].requires_grad_()
    (actual,) = torch.autograd.grad(case.attend(*inputs.values()), inputs[wanted], grad_out)
    assert torch.equal(actual, everything[f"d{wanted}"])


@pytest.mark.parametrize("only", [None, "x"])
def test_second_derivatives_raise(only, device):
    case = cpsa_case(7, 14, 2)
    inputs = case.inputs(FP32, device)
    for name, tensor in inputs.items():
        tensor.requires_grad_(only in (None, name))
    out = case.attend(*inputs.values())
    # as in a gradient penalty: the incoming gradient is a constant
    (dx,) = torch.autograd.grad(out.sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        dx.square().sum().backward()


def test_function_transforms(device):
    case = cpsa_case(7, 14, 2)
    x, *weights = case.inputs(FP32, device).values()

    def loss(x):
        return attend(x).square().sum()

    def attend(x):
        return case.attend(x, *weights)

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    assert torch.equal(torch.func.grad(loss)(x), leaf.grad)
    with torch.no_grad():
        assert torch.equal(torch.func.vmap(attend)(x[None]), attend(x)[None])


@pytest.mark.parametrize("patches", [1, 2])
def test_operators_are_well_formed(patches, device):
    case = cpsa_case(2, 2 * patches, 3, patch_size=2)
    x, *weights = case.inputs(FP16, device).values()
    folded = reference.fold_weights(*weights[:3], 1 / 2)
    seed = torch.tensor([1], device=device)
    grad = random_grad(case.shape, x)
    operators = torch.ops.catkernels
    for given, arguments in (
        (weights, (None, 2, 0.5, 0.0, FP16)),
        ((weights[0], None, weights[2], None), (seed, 2, 0.5, 0.5, FP16)),
    ):
        torch.library.opcheck(operators.cpsa_forward.default, (x, *given, *arguments))
    dropout = (seed, 2, 0.5)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(operators.cpsa_backward.default, (grad, x, folded, *dropout, *needs))


def test_compiles_to_one_graph_for_all_batch_sizes(device):
    case = cpsa_case(6, 6, 3, patch_size=3)
    compiled = torch.compile(case.attend, fullgraph=True, backend="aot_eager")

    def check(batch: int) -> None:
        inputs = replace(case, batch=batch).inputs(FP16, device)
        grad_out = random_grad(replace(case, batch=batch).shape, inputs["x"])
        expected = results(case.attend, inputs, grad_out)
        torch.testing.assert_close(results(compiled, inputs, grad_out), expected)

    check(batch=2)
    check(batch=3)
    with torch.compiler.set_stance("fail_on_recompile"):
        check(batch=5)


def test_exports(device):
    case = cpsa_case(6, 6, 3, patch_size=3)
    inputs = tuple(case.inputs(FP16, device).values())

    class Layer(torch.nn.Module):
        def forward(self, *tensors):
            return case.attend(*tensors)

    exported = torch.export.export(Layer(), inputs)
    with torch.no_grad():
        assert torch.equal(exported.module()(*inputs), Layer()(*inputs))


@pytest.mark.parametrize(("side", "forward", "backward"), [(7, 1, 2), (14, 2, 5)])
def test_flops_are_counted(side, forward, backward, device):
    case = cpsa_case(side, side, 3, batch=2)
    patches, sequences, pixels = (side // 7) ** 2, 6, 49
    x, *weights = case.inputs(FP32, device).values()
    with FlopCounterMode(display=False) as counter:
        case.attend(x.requires_grad_(), *weights).sum().backward()
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    by_matrix = 2 * sequences * patches * pixels**2
    by_tokens = 2 * sequences * patches**2 * pixels if patches > 1 else 0
    assert counts["catkernels.cpsa_forward"] == forward * by_matrix + 2 * by_tokens
    assert counts["catkernels.cpsa_backward"] == backward * by_matrix + 6 * by_tokens


@pytest.mark.launches_nothing
def test_unsupported_reasons_name_each_reason(device, monkeypatch):
    def reasons(**changes):
        call = {"device": device, "dtype": FP16, "patch_size": 7, "num_patches": 4}
        return cpsa.unsupported_reasons(**call | changes)

    assert reasons() == []
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
