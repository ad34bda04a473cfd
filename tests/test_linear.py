"""Linear layers of a block with the norm before or the residual behind them, in one kernel."""

from __future__ import annotations

import pytest
import torch
from dense_cases import (
    AUTOCAST,
    BFLOAT16,
    FACTORS,
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

from catkernels.ops.linear import (
    add_branch,
    joined_reasons,
    linear_residual,
    norm_linear_residual,
    per_image,
)

pytestmark = pytest.mark.usefixtures("round_to_nearest_bf16", "poisoned_memory", "launches")

# Rows that fill no tile, and of several images; the first have two tiles.
SHAPES = [(3, 45, 32), (3, 5, 5, 96)]
MORE_SHAPES = [(3, 45, 64), (2, 30, 128), (3, 43, 192)]
HALF_MODES = [BFLOAT16, AUTOCAST]
MORE_HALF_MODES = [mode for mode in MORE_MODES if mode.products != torch.float32]


def weights(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    return linear.weight, linear.bias


def projection(modules, x):
    """A norm and a layer behind it, by one kernel in half precision."""
    y, x = norm_linear_residual(x, modules["norm"], *weights(modules["fc1"]))
    return y, 2 * x


def official_projection(modules, x):
    return modules["fc1"](modules["norm"](x)), 2 * x


def residual(modules, x):
    """A layer and the residual behind it; what it takes is of the products' dtype."""
    return linear_residual(x, modules["fc1"](x), *weights(modules["fc2"]), factors(x))


def official_residual(modules, x):
    return x + modules["fc2"](modules["fc1"](x)) * per_image(factors(x), x)


CALLS = {"projection": (projection, official_projection), "residual": (residual, official_residual)}
both = pytest.mark.parametrize("call", [projection, residual])
both_beside_official = pytest.mark.parametrize(("call", "official"), CALLS.values(), ids=CALLS)


@pytest.mark.parametrize("mode", sampled(HALF_MODES, MORE_HALF_MODES), ids=str)
@pytest.mark.parametrize("shape", sampled(SHAPES, MORE_SHAPES), ids=str)
@both_beside_official
def test_one_kernel(call, official, shape, mode, device, launches):
    channels = shape[-1]
    modules = half_block(channels, hidden=3 * channels if call is projection else channels)
    assert_right(call, official, modules, rows(*shape).to(device), mode)
    assert launches["norm_linear_kernel"] == (call is projection)
    assert launches["linear_residual_kernel"] == (call is residual)


@pytest.mark.parametrize("mode", sampled(MODES, MORE_MODES), ids=str)
@pytest.mark.parametrize("shape", sampled([(3, 7, 7, 32)], [(2, 45, 96), (9, 384)]), ids=str)
def test_a_norm_beside_pytorchs_product(shape, mode, device, launches):
    """Of features that no kernel takes."""
    modules = half_block(shape[-1], hidden=24)
    assert_right(projection, official_projection, modules, rows(*shape).to(device), mode)
    assert launches["norm_forward_kernel"] == 1


CHANGES = {
    "no bias of the norm": without("norm.bias"),
    "no bias of the first layer": without("fc1.bias"),
    "no bias of the second layer": without("fc2.bias"),
    "a frozen norm": lambda modules: modules["norm"].requires_grad_(False),
    "a frozen weight of the norm": lambda modules: modules["norm"].weight.requires_grad_(False),
    "a frozen first layer": lambda modules: modules["fc1"].requires_grad_(False),
    "a frozen second layer": lambda modules: modules["fc2"].requires_grad_(False),
    "frozen biases": lambda modules: [
        modules[layer].bias.requires_grad_(False) for layer in ("fc1", "fc2")
    ],
    "only x learns": lambda modules: modules.requires_grad_(False),
    "another eps": lambda modules: setattr(modules["norm"], "eps", 0.1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_absent_or_frozen(change, device):
    modules = half_block(32, hidden=32)
    change(modules)
    x = rows(2, 20, 32).to(device)
    for call, official in CALLS.values():
        assert_right(call, official, modules, x, AUTOCAST)
    # in float32 the norm's kernel stands before PyTorch's product
    assert_right(projection, official_projection, modules, x, FLOAT32)


@pytest.mark.parametrize("used", [0, 1], ids=["the layer's output", "the residual"])
def test_one_gradient_may_be_absent(used, device):
    assert_right(
        lambda *inputs: projection(*inputs)[used],
        lambda *inputs: official_projection(*inputs)[used],
        half_block(32, hidden=32),
        rows(2, 20, 32).to(device),
        AUTOCAST,
    )


def test_a_dropped_branch_leaves_its_image_as_it_is(device):
    x = rows(3, 20, 32).to(device)
    found = results(residual, half_block(32, hidden=32).to(device), x, AUTOCAST)
    assert torch.equal(found["output 0"][0], x[0])


def test_without_drop_path(device):
    def ours(modules, x):
        return linear_residual(x, modules["fc1"](x), *weights(modules["fc2"]), None)

    def official(modules, x):
        return x + modules["fc2"](modules["fc1"](x))

    assert_right(ours, official, half_block(32, hidden=32), rows(2, 20, 32).to(device), BFLOAT16)


@both
def test_nothing_is_kept_where_nothing_learns(call, device):
    modules, x = half_block(32, hidden=32).to(device), rows(2, 20, 32).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        with torch.no_grad():
            expected = call(modules, x)
        actual = call(modules.requires_grad_(False), x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    outputs = actual if isinstance(actual, tuple) else (actual,)
    assert not any(output.requires_grad for output in outputs)


@both
def test_results_are_the_same_bits_from_run_to_run(call, device):
    modules, x = half_block(32, hidden=32).to(device), rows(3, 45, 32).to(device)
    first, second = (results(call, modules, x, AUTOCAST) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.launches_nothing
@pytest.mark.parametrize("mode", [FLOAT32, AUTOCAST], ids=str)
@both
def test_no_rows(call, mode, device):
    modules = half_block(32, hidden=32).to(device)
    found = results(call, modules, rows(0, 49, 32).to(device), mode)
    assert found["gradient of x"].shape == (0, 49, 32)
    gradients = [t for name, t in found.items() if "fc" in name or "norm" in name]
    assert len(gradients) == 4
    assert all((gradient == 0).all() for gradient in gradients)


@both
def test_a_row_that_is_not_finite_spoils_no_other(call, device):
    modules = half_block(32, hidden=32).requires_grad_(False).to(device)
    x = rows(1, 40, 32).to(device)
    clean = results(call, modules, x, AUTOCAST)
    x[0, 17, 3] = float("nan")
    spoilt = results(call, modules, x, AUTOCAST)
    others = torch.arange(40, device=device) != 17
    # its branch may be dropped, but infinity times zero is none
    torch.testing.assert_close(spoilt["output 0"][0, others], clean["output 0"][0, others])
    assert spoilt["output 0"][0, 17].isnan().any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.full
@torch.no_grad()
def test_more_elements_than_32_bits_count(device):
    """The last rows of more than 2**31 values are the same alone; takes 9 GB."""
    modules = half_block(96, hidden=288).to(device, torch.bfloat16)
    x = torch.randn(1, 2**31 // 288 + 100, 96, device=device, dtype=torch.bfloat16)
    qkv, _ = norm_linear_residual(x, modules["norm"], *weights(modules["fc1"]))
    alone, _ = norm_linear_residual(x[:, -70:], modules["norm"], *weights(modules["fc1"]))
    assert qkv.numel() > 2**31
    assert torch.equal(qkv[:, -50:], alone[:, -50:])
    whole, alone = (
        linear_residual(x[:, part], qkv[:, part], *weights(modules["fc2"]), None)[:, -50:]
        for part in (slice(None), slice(-70, None))
    )
    assert torch.equal(whole, alone)


def test_any_strides(device):
    """Of the map, of what a layer takes, and of a gradient that is expanded."""
    modules = half_block(32, hidden=32).to(device)
    x = rows(2, 32, 5, 7).to(device).permute(0, 2, 3, 1)

    def gradients(call):
        leaf = x.detach().requires_grad_()
        with torch.autocast(device.type, torch.bfloat16):
            outputs = call(modules, leaf)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        return torch.autograd.grad(first.sum(), leaf)[0]

    for call, official in CALLS.values():
        torch.testing.assert_close(gradients(call), gradients(official), rtol=0.02, atol=0.02)


def kept(call, modules: nn.ModuleDict, x: Tensor) -> list[Tensor]:
    """What is kept for the backward pass and is no parameter."""
    tensors = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensors.append(tensor) or tensor, lambda tensor: tensor
    ):
        call(modules, x)
    parameters = {parameter.data_ptr() for parameter in modules.parameters()}
    return [tensor for tensor in tensors if tensor.data_ptr() not in parameters]


@pytest.mark.parametrize("mode", [FLOAT32, AUTOCAST], ids=str)
def test_what_is_kept(mode, device):
    """The input of the norm, or of the layer; of the parameters nothing but themselves."""
    modules, x = half_block(32, hidden=32).to(device), rows(2, 20, 32).to(device).requires_grad_()
    inputs = rows(2, 20, 32, seed=5).to(device, mode.products).requires_grad_()
    factor = FACTORS[:2].to(inputs)

    def layer(modules, x):
        linear_residual(x, inputs, *weights(modules["fc2"]), factor)

    def norm_and_layer(modules, x):
        norm_linear_residual(x, modules["norm"], *weights(modules["fc1"]))

    with torch.autocast(device.type, mode.autocast, enabled=mode is AUTOCAST):
        places = [tensor.data_ptr() for tensor in kept(layer, modules, x)]
        assert places == [inputs.data_ptr(), factor.data_ptr()]
        (only,) = kept(norm_and_layer, modules, x)
    assert only.data_ptr() == x.data_ptr()


def test_second_derivatives(device):
    """Of a norm there are none; those of a layer with its residual are right."""
    modules, x = half_block(32, hidden=32).to(device), rows(2, 20, 32).to(device).requires_grad_()
    (gradient,) = torch.autograd.grad(
        projection(modules, x)[0].square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match=r'norms cannot be differentiated twice.*"reference"'):
        gradient.sum().backward()

    def second(call):
        (gradient,) = torch.autograd.grad(call(modules, x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), modules["fc2"].weight)

    torch.testing.assert_close(second(residual), second(official_residual), rtol=1e-3, atol=1.0)


@pytest.mark.launches_nothing
def test_a_gradient_that_is_differentiated_may_be_of_another_dtype(device):
    """As where a loss is penalised for its gradient, under autocast."""
    x = rows(3, 20, 32).to(device).requires_grad_()
    branch = rows(3, 20, 32, seed=5).to(device).bfloat16().requires_grad_()
    output = add_branch(x, branch, FACTORS.to(device, torch.bfloat16))
    (gradient,) = torch.autograd.grad(output.square().sum(), branch, create_graph=True)
    gradient.float().sum().backward()
    expected = 2 * per_image(FACTORS, x).to(device).expand_as(x)
    torch.testing.assert_close(x.grad, expected, rtol=0.01, atol=0)


def test_operators(device):
    modules = half_block(32, hidden=32).to(device).requires_grad_(False)
    x, factor = rows(2, 20, 32).to(device), FACTORS[1:].to(device)
    norm_weight, norm_bias, weight, bias, *_ = modules.parameters()
    operators = torch.ops.catkernels
    for absent in ({2, 4}, set()):
        inputs = (x, norm_weight, norm_bias, weight, bias, 1e-5)
        inputs = [None if i in absent else value for i, value in enumerate(inputs)]
        torch.library.opcheck(operators.norm_linear, inputs)
    for optional in ((bias, factor), (None, None)):
        torch.library.opcheck(operators.linear_residual, (x, x, weight, *optional))
    half = weight.bfloat16()
    torch.library.opcheck(operators.norm_linear, (x, norm_weight, norm_bias, half, bias, 1e-5))
    torch.library.opcheck(operators.linear_residual, (x, x.bfloat16(), half, bias, factor))


def test_flops_are_those_of_the_products(device):
    modules, x = half_block(32, hidden=64).to(device), rows(3, 20, 32).to(device).requires_grad_()
    for call, official in CALLS.values():
        counted = []
        for function in (call, official):
            with FlopCounterMode(display=False) as counter:
                with torch.autocast(device.type, torch.bfloat16):
                    output = function(modules, x)
                (output if isinstance(output, Tensor) else output[0]).sum().backward()
            counted.append(counter.get_total_flops())
        assert counted[0] == counted[1]


@pytest.mark.launches_nothing
def test_reasons():
    usual = {"products": torch.bfloat16, "channels": 96, "features": 288}
    assert joined_reasons(**usual) == []
    for change, reason in (
        ({"channels": 384}, "64, 96, 128 or 192 channels, not 384"),
        ({"features": 100}, "in steps of 32, not 100"),
        ({"products": torch.float32}, "in half precision, not in torch.float32"),
    ):
        (found,) = joined_reasons(**usual | change)
        assert reason in found


@pytest.mark.launches_nothing
def test_the_branch_is_added_in_one_pass_each_way(device):
    x = rows(3, 20, 32).to(device).requires_grad_()
    branch = rows(3, 20, 32, seed=5).to(device).bfloat16().requires_grad_()
    factor = FACTORS.to(device, torch.bfloat16)
    output = add_branch(x, branch, factor)
    torch.testing.assert_close(output, x + per_image(factor, x) * branch.float())
    grads = torch.autograd.grad(output.sum(), (x, branch))
    assert [grad.dtype for grad in grads] == [torch.float32, torch.bfloat16]
    torch.testing.assert_close(grads[1].float(), per_image(FACTORS, x).expand_as(x).to(device))
