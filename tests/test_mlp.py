"""The MLP of a block with its norm and residual: in one kernel, and between PyTorch's products."""

from __future__ import annotations

import pytest
import torch
from dense_cases import (
    AUTOCAST,
    BFLOAT16,
    FACTORS,
    FLOAT16,
    FLOAT32,
    MODES,
    MORE_MODES,
    assert_right,
    factors,
    half_block,
    results,
    rows,
    sampled,
    without,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from catkernels.ops.linear import per_image
from catkernels.ops.mlp import bias_gelu, fused_mlp, fused_reasons, split_mlp

pytestmark = pytest.mark.usefixtures("round_to_nearest_bf16", "poisoned_memory", "launches")

# Rows that fill no tile, and of several images.
SHAPES = [(3, 25, 32), (3, 5, 5, 96)]
MORE_SHAPES = [(3, 45, 64), (3, 30, 128), (3, 23, 192)]
CALLS = {"one kernel": fused_mlp, "between products": split_mlp}


def ours(call, dropped=True):
    return lambda modules, x: call(x, *modules.values(), factors(x) if dropped else None)


def official(dropped=True):
    """Output and branch: next to x, errors of the branch would be hard to see."""

    def call(modules, x):
        hidden = nn.functional.gelu(modules["fc1"](modules["norm"](x)))
        branch = modules["fc2"](hidden)
        return x + (branch * per_image(factors(x), x) if dropped else branch)

    return call


def assert_mlp_is_right(call, modules, x, mode, dropped=True):
    assert_right(ours(call, dropped), official(dropped), modules, x, mode)


@pytest.mark.parametrize("mode", sampled(MODES, MORE_MODES), ids=str)
@pytest.mark.parametrize("shape", sampled(SHAPES, MORE_SHAPES), ids=str)
def test_one_kernel(shape, mode, device, launches):
    assert_mlp_is_right(fused_mlp, half_block(shape[-1]), rows(*shape).to(device), mode)
    assert launches["mlp_forward_kernel"] == 1
    assert launches["mlp_backward_kernel"] == (shape[-1] <= 96)


@pytest.mark.parametrize("mode", [BFLOAT16, AUTOCAST], ids=str)
@pytest.mark.parametrize("shape", sampled([(3, 25, 96)], [(3, 45, 64)]), ids=str)
def test_resident_weights(shape, mode, device, launches):
    """Two programs with several tiles each, as some GPUs launch it."""
    from catkernels.kernels.dense.launch import MlpLaunch, mlp_forward_launch
    from catkernels.kernels.launch import overriding

    resident = MlpLaunch(4, 1, rows=32, units=64, resident_programs=2)

    def answer(table, problem, shipped):
        return resident if table is mlp_forward_launch else shipped

    with overriding(answer):
        assert_mlp_is_right(fused_mlp, half_block(shape[-1]), rows(*shape).to(device), mode)
    assert launches["mlp_resident_kernel"] == 1


@pytest.mark.parametrize("mode", sampled(MODES, MORE_MODES), ids=str)
@pytest.mark.parametrize("shape", sampled([(3, 7, 96)], [(3, 50, 32), (3, 7, 384)]), ids=str)
def test_between_products(shape, mode, device, launches):
    assert_mlp_is_right(split_mlp, half_block(shape[-1]), rows(*shape).to(device), mode)
    assert launches["bias_gelu_backward_kernel"] == 1


def frozen(*names: str):
    return lambda modules: [modules.get_parameter(n).requires_grad_(False) for n in names]


CHANGES = {
    "no bias of the norm": without("norm.bias"),
    "no bias of fc1": without("fc1.bias"),
    "no bias of fc2": without("fc2.bias"),
    "a frozen norm": frozen("norm.weight", "norm.bias"),
    "a frozen fc1": frozen("fc1.weight", "fc1.bias"),
    "a frozen fc2": frozen("fc2.weight", "fc2.bias"),
    "frozen biases": frozen("norm.bias", "fc1.bias", "fc2.bias"),
    "frozen weights": frozen("norm.weight", "fc1.weight", "fc2.weight"),
    "only x learns": lambda modules: modules.requires_grad_(False),
    "another eps": lambda modules: setattr(modules["norm"], "eps", 0.1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_is_absent_or_frozen(call, change, device):
    modules = half_block(32, hidden=64)
    change(modules)
    assert_mlp_is_right(call, modules, rows(3, 20, 32).to(device), FLOAT32)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_without_drop_path(call, device):
    x = rows(3, 20, 32).to(device)
    for mode in (FLOAT32, AUTOCAST):
        assert_mlp_is_right(call, half_block(32, hidden=64), x, mode, dropped=False)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_dropped_branch_leaves_its_image_as_it_is(call, device):
    modules, x = half_block(32, hidden=64).to(device), rows(3, 20, 32).to(device)
    found = results(ours(call), modules, x, FLOAT32)
    assert torch.equal(found["output 0"][0], x[0])


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_nothing_is_kept_where_nothing_learns(call, device):
    modules, x = half_block(32, hidden=64).to(device), rows(2, 20, 32).to(device)
    with torch.no_grad():
        expected = call(x, *modules.values(), None)
    actual = call(x, *modules.requires_grad_(False).values(), None)
    assert not actual.requires_grad
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_results_are_the_same_bits_from_run_to_run(call, device):
    modules, x = half_block(32).to(device), rows(3, 45, 32).to(device)
    first, second = (results(ours(call), modules, x, AUTOCAST) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.launches_nothing
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_no_rows(call, device):
    modules = half_block(32, hidden=64).to(device)
    found = results(ours(call), modules, rows(0, 49, 32).to(device), FLOAT32)
    assert found.pop("output 0").shape == found.pop("gradient of x").shape == (0, 49, 32)
    assert len(found) == 6
    assert all((gradient == 0).all() for gradient in found.values())


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_row_that_is_not_finite_spoils_no_other(call, device):
    modules, x = half_block(32, hidden=64).requires_grad_(False).to(device), rows(1, 40, 32)
    x = x.to(device)
    clean = results(ours(call, False), modules, x, AUTOCAST)
    x[0, 17, 3] = float("nan")
    spoilt = results(ours(call, False), modules, x, AUTOCAST)
    others = torch.arange(40, device=device) != 17
    for name, tensor in spoilt.items():
        torch.testing.assert_close(tensor[0, others], clean[name][0, others], rtol=0, atol=0)
        assert tensor[0, 17].isnan().any()


@pytest.mark.parametrize("values", ["large", "small"])
def test_hidden_units_of_any_size(values, device):
    """GELU of what is far out, and of what is near zero."""
    modules = half_block(32, hidden=64)
    with torch.no_grad():
        modules["fc1"].weight.mul_({"large": 100.0, "small": 1e-4}[values])
        modules["fc1"].bias.mul_({"large": 100.0, "small": 1e-4}[values])
    x = rows(3, 20, 32).to(device)
    for call in CALLS.values():
        for mode in (BFLOAT16, FLOAT16, FLOAT32):
            assert_mlp_is_right(call, modules, x, mode)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.full
def test_more_elements_than_32_bits_count(device):
    """The last rows of more than 2**31 values are the same alone; takes 17 GB."""
    modules = half_block(96).to(device, torch.bfloat16)

    def passes(x: Tensor, *, differentiated: bool) -> Tensor:
        leaf = x.clone().requires_grad_(differentiated)
        with torch.set_grad_enabled(differentiated):
            output = fused_mlp(leaf, *modules.values(), None)
        last = output if not differentiated else torch.autograd.grad(output, leaf, x)[0]
        return last[:, -50:].clone()

    # the map, and where there are gradients the hidden units
    for size, differentiated in ((2**31 // 96, False), (2**31 // 384, True)):
        x = torch.randn(1, size + 100, 96, device=device, dtype=torch.bfloat16)
        whole = passes(x, differentiated=differentiated)
        assert torch.equal(whole, passes(x[:, -70:], differentiated=differentiated))
    h = torch.randn(2**31 // 384 + 100, 384, device=device, dtype=torch.bfloat16)
    assert h.numel() > 2**31
    bias = modules["fc1"].bias
    gradients = []
    for part in (h, h[-70:]):
        leaf = part.clone().requires_grad_()
        gradients.append(torch.autograd.grad(bias_gelu(leaf, bias), leaf, part)[0][-50:])
    assert torch.equal(*gradients)


def kept(call, modules: nn.ModuleDict, x: Tensor) -> list[Tensor]:
    """What is kept for the backward pass and is no parameter."""
    tensors = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensors.setdefault(tensor.data_ptr(), tensor), lambda tensor: tensor
    ):
        call(x, *modules.values(), factors(x))
    parameters = {parameter.data_ptr() for parameter in modules.parameters()}
    return [tensor for place, tensor in tensors.items() if place not in parameters]


def test_what_is_kept(device):
    """One map by the one kernel; nine between products, where a hidden unit is a quarter of 4."""
    modules, x = half_block(32).to(device), rows(3, 20, 32).to(device).requires_grad_()
    for call, maps in ((fused_mlp, 1), (split_mlp, 9)):
        values = sum(tensor.numel() for tensor in kept(call, modules, x))
        assert values == maps * x.numel() + len(FACTORS)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_second_derivatives_are_refused(call, device):
    modules, x = half_block(32, hidden=64).to(device), rows(2, 20, 32).to(device).requires_grad_()
    output = call(x, *modules.values(), None)
    (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r'cannot be differentiated twice.*"reference"'):
        gradient.sum().backward()


def test_operators(device):
    modules = half_block(32, hidden=64).to(device).requires_grad_(False)
    x, factor = rows(2, 20, 32).to(device), FACTORS[1:].to(device)
    (norm_weight, norm_bias, *fc1, fc2_weight, fc2_bias) = modules.parameters()
    operators = torch.ops.catkernels
    forward = (x, norm_weight, norm_bias, *fc1, fc2_weight, fc2_bias, factor, 1e-5)
    torch.library.opcheck(operators.mlp_forward, forward)
    for absent in ({2, 4, 6, 7}, set()):
        backward = [None if i in absent else t for i, t in enumerate(forward) if i != 6]
        torch.library.opcheck(operators.mlp_backward, (x, *backward))
    h, bias = rows(2, 20, 64).to(device), fc1[1]
    torch.library.opcheck(operators.bias_gelu, (h, bias))
    for needs in ((True, True), (False, False)):
        torch.library.opcheck(operators.bias_gelu_backward, (h, h, bias, *needs))


def test_flops_are_those_of_the_products(device):
    modules, x = half_block(32).to(device), rows(3, 20, 32).to(device).requires_grad_()
    counted = []
    for call in (lambda: official()(modules, x), lambda: ours(fused_mlp)(modules, x)):
        with FlopCounterMode(display=False) as forward:
            output = call()
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
        counted.append((forward.get_total_flops(), backward.get_total_flops()))
    (forward, backward), (our_forward, our_backward) = counted
    assert our_forward == forward
    # the first product again, and eight columns of ones in that of fc1's gradient
    ones = 2 * 60 * 128 * 8
    assert our_backward == backward + forward // 2 + ones


@pytest.mark.launches_nothing
def test_reasons():
    usual = {"products": torch.bfloat16, "shape": torch.Size((384, 96))}
    assert fused_reasons(**usual) == []
    for change, reason in (
        ({"shape": torch.Size((1536, 384))}, "64, 96, 128 or 192 channels, not 384"),
        ({"shape": torch.Size((96, 64))}, "in steps of 64, not 96"),
        ({"products": torch.float32}, "in half precision, not in torch.float32"),
    ):
        (found,) = fused_reasons(**usual | change)
        assert reason in found
