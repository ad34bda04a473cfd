"""CPSA's weights folded by one kernel: as the reference folds them, with and without gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import BF16, DTYPES, FP16, FP32
from torch.utils._python_dispatch import TorchDispatchMode

import catkernels
from catkernels import reference
from catkernels.accuracy import assert_within_error_budget
from catkernels.cases import (
    CPSA_PATCH_COUNTS,
    CPSACase,
    Inputs,
    converted,
    cpsa_case,
    make_cpsa_inputs,
    results,
)
from catkernels.dropout import SameDropout

pytestmark = pytest.mark.usefixtures("round_to_nearest_bf16", "poisoned_memory", "launches")

KERNEL = "cpsa_fold_weights_kernel"
# of patches in one tile, in several, and in blocks
CASES = [CPSA_PATCH_COUNTS[0], CPSA_PATCH_COUNTS[3], cpsa_case(9, 70, 2), cpsa_case(63, 70, 1)]
BIASES = [(), ("qkv_bias",), ("proj_bias",), ("qkv_bias", "proj_bias")]


def judge(case: CPSACase, inputs: Inputs) -> None:
    """Judge what the kernels give without gradients by the error budget."""
    given = (inputs, inputs, converted(inputs, torch.float64))
    by = (case.attend, case.specified, case.specified)
    found = (results(attend, tensors)["out"] for attend, tensors in zip(by, given, strict=True))
    assert_within_error_budget(*found, str(case))


@pytest.fixture
def fold():
    """The launch of the kernel; no test imports Triton before it is known to be here."""
    from catkernels.kernels.cpsa.fold import fold_weights

    return fold_weights


def some_weights(patch_size: int, device: torch.device) -> list[torch.Tensor | None]:
    """Of every dtype and with every pair of biases, by turns over the sizes of patches."""
    without = BIASES[patch_size % 4]
    case = replace(cpsa_case(1, 1, 1, patch_size), without=without)
    _, *weights = case.inputs(DTYPES[patch_size % 3], device, seed=patch_size).values()
    return weights


def unprepared(matrices, constants, patch_size) -> dict[str, torch.Tensor]:
    """A with u, M with Wp bv, and the bias, of float32 matrices: powers of two undo nothing."""
    powers = constants[3, :2, None, None]
    products = on_patch(on_patch(matrices * powers, patch_size).mT, patch_size).mT
    score_constant, value_constant, bias, _ = on_patch(constants, patch_size)
    added = torch.stack([score_constant * powers[0, 0], value_constant])
    return {"folded": torch.cat([products, added[:, None]], 1), "bias": bias}


def on_patch(tensor: torch.Tensor, patch_size: int) -> torch.Tensor:
    """What stands at a patch's own pixels (.., N*N) of the grid (.., 64)."""
    pixel = torch.arange(patch_size**2, device=tensor.device)
    return tensor[..., pixel // patch_size * 8 + pixel % patch_size]


@pytest.mark.parametrize("patch_size", range(1, 9))
def test_folds_as_precisely_as_the_reference(patch_size, device, fold, launches):
    weights = some_weights(patch_size, device)
    found = unprepared(*fold(*weights, 0.3, patch_size, FP32, "out"), patch_size)
    assert launches == {KERNEL: 1}
    again = unprepared(*fold(*weights, 0.3, patch_size, FP32, "out"), patch_size)
    assert all(torch.equal(found[name], again[name]) for name in found)
    exact = [None if tensor is None else tensor.double() for tensor in weights]
    same, truth = (reference.fold_weights(*given[:3], 0.3) for given in (weights, exact))
    assert_within_error_budget(found["folded"], same, truth, "folded")
    bias = torch.zeros(patch_size**2, device=device) if weights[3] is None else weights[3]
    assert torch.equal(found["bias"], bias.float())


@pytest.mark.parametrize("value_rows", ["out", "values"])
@pytest.mark.parametrize("patch_size", range(1, 9))
def test_prepares_what_the_backward_pass_does(patch_size, value_rows, device, fold):
    from catkernels.kernels.cpsa.weights import prepare_weights

    dtype = DTYPES[(patch_size + len(value_rows)) % 3]
    # sums of small integers are exact in any order
    weights = [
        None if w is None else (8 * w).round().float() for w in some_weights(patch_size, device)
    ]
    matrices, constants = fold(*weights, 0.25, patch_size, dtype, value_rows)
    folded = reference.fold_weights(*weights[:3], 0.25)
    value_constant, bias = folded[1, -1].clone(), weights[3]
    if value_rows == "out" and bias is not None:
        # as if the bias were a part of Wp bv
        folded[1, -1] += bias
    expected, expected_constants = prepare_weights(folded, patch_size, dtype, "values")
    assert torch.equal(matrices, expected)
    assert torch.equal(constants[0], expected_constants[0])
    assert torch.equal(constants[3, :2], expected_constants[3, :2])
    found = [on_patch(row, patch_size) for row in constants[1:3]]
    assert torch.equal(found[0], value_constant)
    assert torch.equal(found[1], torch.zeros_like(value_constant) if bias is None else bias)
    assert constants[1:3].count_nonzero() == torch.stack(found).count_nonzero()


def each_with_one_dtype():
    """Each case with one dtype, by turns; `--full` takes the other two as well."""
    for turn, case in enumerate(CASES):
        for place, dtype in enumerate(DTYPES):
            marks = () if turn % 3 == place else pytest.mark.full
            yield pytest.param(case, dtype, id=f"{case}-{dtype}", marks=marks)


@pytest.mark.parametrize(("case", "dtype"), list(each_with_one_dtype()))
def test_attends_with_what_it_folded(case, dtype, device, launches):
    judge(case, case.inputs(dtype, device))
    assert launches[KERNEL] == 1
    assert not launches["cpsa_prepare_weights_kernel"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_drops_values_without_the_bias(case, device):
    case, seed = replace(case, dropout_p=0.25), 0x1234_5678_9ABC_DEF0
    with SameDropout(seed, case.kept(seed)):
        judge(case, case.inputs(FP16, device))


def test_autocast_folds_the_weights_in_float32(device):
    case = replace(cpsa_case(14, 21, 5), mixed=True)
    inputs = case.inputs(FP32, device)
    with torch.autocast(device.type, FP16), torch.no_grad():
        out = catkernels.cpsa_attention(**inputs, patch_size=7, backend="triton")
        same_dtype = case.specified(*inputs.values())
    float64 = case.specified(*converted(inputs, torch.float64).values())
    assert out.dtype == FP16
    assert_within_error_budget(out, same_dtype, float64, "out")


def test_weights_of_any_strides_and_dtypes(device):
    case = cpsa_case(14, 7, 5)
    inputs = case.inputs(BF16, device)
    expected = results(case.attend, inputs)["out"]
    inputs["qkv_weight"] = inputs["qkv_weight"].t().contiguous().t()
    inputs["proj_weight"] = inputs["proj_weight"].float()
    inputs["proj_bias"] = inputs["proj_bias"].repeat_interleave(2)[::2]
    assert torch.equal(results(case.attend, inputs)["out"], expected)


def test_nothing_is_kept_between_calls(device):
    """However weights are written to, the next call reads what they are."""
    case = cpsa_case(7, 14, 3)
    inputs, others = (case.inputs(FP16, device, seed=seed) for seed in (0, 1))
    judge(case, inputs)
    for name in inputs:
        inputs[name].data.copy_(others[name])  # leaves no trace, unlike a write to the tensor
    judge(case, inputs)


class Called(TorchDispatchMode):
    """The operators that are called, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.operators.append(str(operator.overloadpacket))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_call_is_one_operator_and_two_launches(autocast, device, launches):
    """What one image waits for is the host: the fold as operations of its own would be a dozen."""
    case = cpsa_case(7, 14, 3)
    inputs = case.inputs(FP32 if autocast else FP16, device)
    with torch.autocast(device.type, FP16, enabled=autocast), Called() as called:
        catkernels.cpsa_attention(**inputs, patch_size=7, backend="triton")
    assert called.operators == ["catkernels.cpsa_forward"]
    assert launches == {KERNEL: 1, "cpsa_map_forward_kernel": 1}


def test_compiles_and_exports_without_gradients(device):
    case = cpsa_case(6, 6, 3, patch_size=3)
    inputs = tuple(case.inputs(FP16, device).values())
    expected = results(case.attend, case.inputs(FP16, device))["out"]
    compiled = torch.compile(case.attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), expected)

    class Layer(torch.nn.Module):
        def forward(self, *tensors):
            return case.attend(*tensors)

    exported = torch.export.export(Layer(), inputs)
    assert "cpsa_forward" in exported.graph_module.code
    assert torch.equal(exported.module()(*inputs), expected)


def test_several_sets_of_weights_under_vmap(device):
    case = cpsa_case(6, 3, 2, patch_size=3)
    sets = [case.inputs(FP16, device, seed=seed) for seed in range(2)]
    stacked = [
        torch.stack(tensors) for tensors in zip(*(inputs.values() for inputs in sets), strict=True)
    ]
    with torch.no_grad():
        found = torch.func.vmap(case.attend)(*stacked)
    expected = [results(case.attend, inputs)["out"] for inputs in sets]
    assert torch.equal(found, torch.stack(expected))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_gradients_change_no_bit_of_the_output(dropout_p, device):
    """What is checkpointed is computed without gradients first, and then with them."""
    case = replace(cpsa_case(14, 14, 3), dropout_p=dropout_p)
    x, *weights = case.inputs(FP16, device).values()
    outputs = []
    for needs_grad in (False, True):
        torch.manual_seed(0)
        outputs.append(case.attend(x.requires_grad_(needs_grad), *weights).detach())
    assert torch.equal(*outputs)


@pytest.mark.launches_nothing
def test_an_empty_batch_folds_nothing(device):
    case = cpsa_case(14, 14, 3, batch=0)
    assert results(case.attend, case.inputs(FP16, device))["out"].shape == (0, 14, 14, 3)


def test_weights_that_overflow_half_precision_do_not_when_folded(device):
    case = cpsa_case(7, 14, 3)
    inputs = make_cpsa_inputs(case.shape, FP32, device)
    inputs["proj_weight"] *= 1e6
    inputs["qkv_weight"][98:] *= 1e-6
    judge(case, inputs)
