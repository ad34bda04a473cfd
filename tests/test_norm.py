"""A norm whose gradient comes back together with the one that went around it."""

from __future__ import annotations

import pytest
import torch
from dense_cases import (
    AUTOCAST,
    FLOAT32,
    MODES,
    MORE_MODES,
    assert_right,
    half_block,
    results,
    rows,
    sampled,
    without,
)

from catkernels.ops.norm import norm_residual, unsupported_reasons
from catkernels.torch_state.precision import compute_dtype

pytestmark = pytest.mark.usefixtures("round_to_nearest_bf16", "poisoned_memory", "launches")

# None fills its tiles; the second has several of them.
SHAPES = [(3, 7, 7, 32), (2, 200, 40), (2, 45, 96), (9, 384)]
MORE_SHAPES = [(1, 50, 64), (70, 128), (1, 33, 192), (5, 768), (3, 1024)]


def norm(modules, x):
    normed, x = norm_residual(x, modules["norm"])
    return normed.double(), 2 * x


def official_norm(modules, x):
    # as the linear layer behind it takes it
    return modules["norm"](x).to(compute_dtype(x)).double(), 2 * x


@pytest.mark.parametrize("mode", sampled(MODES, MORE_MODES), ids=str)
@pytest.mark.parametrize("shape", sampled(SHAPES, MORE_SHAPES), ids=str)
def test_norm(shape, mode, device):
    assert_right(norm, official_norm, half_block(shape[-1]), rows(*shape).to(device), mode)


CHANGES = {
    "no bias of the norm": without("norm.bias"),
    "a frozen norm": lambda modules: modules["norm"].requires_grad_(False),
    "a frozen weight of the norm": lambda modules: modules["norm"].weight.requires_grad_(False),
    "only x learns": lambda modules: modules.requires_grad_(False),
    "another eps": lambda modules: setattr(modules["norm"], "eps", 0.1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_absent_or_frozen(change, device):
    modules = half_block(32)
    change(modules)
    assert_right(norm, official_norm, modules, rows(2, 40, 32).to(device), FLOAT32)


@pytest.mark.parametrize("used", [0, 1], ids=["the norm's output", "the residual"])
def test_one_gradient_may_be_absent(used, device):
    modules, x = half_block(32), rows(2, 40, 32).to(device)
    assert_right(
        lambda *inputs: norm(*inputs)[used],
        lambda *inputs: official_norm(*inputs)[used],
        modules,
        x,
        FLOAT32,
    )


def test_nothing_is_kept_where_nothing_learns(device):
    modules, x = half_block(32).to(device), rows(2, 40, 32).to(device)
    with torch.no_grad():
        expected = norm(modules, x)
    actual = norm(modules.requires_grad_(False), x)
    assert not any(output.requires_grad for output in actual)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_results_are_the_same_bits_from_run_to_run(device):
    modules, x = half_block(64).to(device), rows(3, 100, 64).to(device)
    first, second = (results(norm, modules, x, AUTOCAST) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.launches_nothing
def test_no_rows(device):
    modules = half_block(32).to(device)
    found = results(norm, modules, rows(0, 49, 32).to(device), FLOAT32)
    assert found["gradient of x"].shape == (0, 49, 32)
    gradients = [t for name, t in found.items() if "norm" in name]
    assert gradients
    assert all((gradient == 0).all() for gradient in gradients)


def test_any_strides(device):
    """Of the map, and of a gradient that is expanded."""
    modules = half_block(32).to(device)
    x = rows(2, 32, 7, 9).to(device).permute(0, 2, 3, 1)

    def gradients(call):
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(call(modules, leaf)[0].sum(), leaf)[0]

    torch.testing.assert_close(gradients(norm), gradients(official_norm))


def test_a_row_that_is_not_finite_spoils_no_other(device):
    x = rows(40, 32).to(device)
    clean = results(norm, half_block(32).requires_grad_(False), x, FLOAT32)
    x[17, 3] = float("nan")
    spoilt = results(norm, half_block(32).requires_grad_(False), x, FLOAT32)
    for name, tensor in spoilt.items():
        others = torch.arange(40) != 17
        torch.testing.assert_close(tensor[others], clean[name][others], rtol=0, atol=0)
        assert tensor[17].isnan().any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.full
def test_more_elements_than_32_bits_count(device):
    """The last rows of more than 2**31 values are the same alone; takes 17 GB."""
    layer = half_block(96)["norm"].to(device, torch.bfloat16)
    x = torch.randn(2**31 // 96 + 100, 96, device=device, dtype=torch.bfloat16)
    grad = torch.randn_like(x)

    def passes(part: slice):
        leaf = x[part].detach().requires_grad_()
        outputs = norm_residual(leaf, layer)
        (dx,) = torch.autograd.grad(outputs, leaf, (grad[part], grad[part]))
        return outputs[0].detach()[-50:], dx[-50:]

    assert x.numel() > 2**31
    for whole, alone in zip(passes(slice(None)), passes(slice(-70, None)), strict=True):
        assert torch.equal(whole, alone)


def test_only_x_is_kept(device):
    modules, x = half_block(32).to(device), rows(2, 40, 32).to(device).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm_residual(x, modules["norm"])
    expected = [x, modules["norm"].weight, modules["norm"].bias]
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in expected]


def test_gradients_come_in_one_launch(device, launches):
    modules = half_block(32).to(device)
    results(norm, modules, rows(2, 40, 32).to(device), FLOAT32)
    assert launches == {"norm_forward_kernel": 1, "norm_backward_kernel": 1}


def test_second_derivatives_are_refused(device):
    modules, x = half_block(32).to(device), rows(2, 40, 32).to(device).requires_grad_()
    (gradient,) = torch.autograd.grad(norm(modules, x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r'norms cannot be differentiated twice.*"reference"'):
        gradient.sum().backward()


def test_operators(device):
    x, weight, bias = (rows(*size).to(device) for size in ((3, 5, 16), (16,), (16,)))
    operators = torch.ops.catkernels
    torch.library.opcheck(operators.norm_forward, (x, weight, bias, 1e-5, torch.bfloat16))
    torch.library.opcheck(operators.norm_forward, (x, weight, None, 1e-5, torch.float32))
    for needs in ((True, True), (False, False)):
        torch.library.opcheck(operators.norm_backward, (x, x, x, weight, bias, 1e-5, *needs))
    torch.library.opcheck(
        operators.norm_backward, (x.half(), None, x, weight, None, 1e-5, True, True)
    )


@pytest.mark.launches_nothing
def test_reasons(device):
    usual = {"device": device, "dtypes": {torch.float32, torch.bfloat16}, "channels": 96}
    assert unsupported_reasons(**usual) == []
    for change, reason in (
        ({"channels": 20}, "in steps of 8, not 20"),
        ({"channels": 1032}, "up to 1024 channels"),
        ({"dtypes": {torch.float64}}, "not torch.float64"),
        ({"device": torch.device("meta")}, "on meta"),
    ):
        (found,) = unsupported_reasons(**usual | change)
        assert reason in found
