"""The error budget, by itself: every other test of a number rests on it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from catkernels import accuracy
from catkernels.accuracy import (
    OutOfBudget,
    assert_draws_within_error_budget,
    assert_within_error_budget,
)

TRUTH = torch.tensor([1.0, -2.0, 4.0, 0.5], dtype=torch.float64)
EPS = torch.finfo(torch.float32).eps


def off_by(error: float, place: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The truth with one value off."""
    tensor = TRUTH.clone()
    tensor[place] += error
    return tensor.to(dtype)


def test_twice_the_error_of_plain_pytorch_is_allowed_and_no_more():
    eager = off_by(1e-3)
    for place in range(4):
        share = assert_within_error_budget(off_by(1.999e-3, place), eager, TRUTH)
        assert 0.99 < share < 1
        with pytest.raises(OutOfBudget, match=r"scores: largest error 2\.1.*eager 1\.0"):
            assert_within_error_budget(off_by(2.1e-3, place), eager, TRUTH, "scores")


def test_one_rounding_step_of_the_largest_value_is_allowed_and_no_more():
    """Where plain PyTorch happens to be exact. One step in each value is too much on average."""
    exact = TRUTH.float()
    assert_within_error_budget(off_by(3.9 * EPS, place=2, dtype=torch.float32), exact, TRUTH)
    with pytest.raises(OutOfBudget, match="root mean square"):
        assert_within_error_budget((TRUTH + 3.9 * EPS).float(), exact, TRUTH)
    # a result in half precision is judged by its own steps
    assert_within_error_budget(off_by(3e-3, place=2).half(), exact, TRUTH)


def test_a_wrong_mean_is_seen_below_the_largest_error():
    """Every value a little off, which no single one of them shows."""
    eager = TRUTH.clone()
    eager[0] += 1e-3
    with pytest.raises(OutOfBudget, match="root mean square"):
        assert_within_error_budget(TRUTH + 1.9e-3, eager, TRUTH)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_out_of_budget(value):
    with pytest.raises(OutOfBudget, match="1 values are not finite"):
        assert_within_error_budget(off_by(value), TRUTH, TRUTH)
    # a reference that overflows excuses nothing
    with pytest.raises(OutOfBudget):
        assert_within_error_budget(off_by(1.0), off_by(math.nan), TRUTH)


def test_another_shape_is_out_of_budget_and_never_broadcast():
    with pytest.raises(OutOfBudget, match=r"out: \(1, 4\), not \(4,\)"):
        assert_within_error_budget(TRUTH[None], TRUTH, TRUTH, "out")


def test_what_cannot_judge_is_refused():
    for same_dtype, truth in ((TRUTH, TRUTH.float()), (TRUTH[None], TRUTH), (TRUTH[:1], TRUTH)):
        with pytest.raises(ValueError, match="need one shape, and the truth float64"):
            assert_within_error_budget(TRUTH, same_dtype, truth)
    with pytest.raises(ValueError, match="nothing was drawn"):
        assert_draws_within_error_budget([], "random shapes")


def test_nothing_is_within_any_budget():
    empty = torch.empty(0, 3, dtype=torch.float64)
    assert assert_within_error_budget(empty, empty, empty) == 0


def test_draws_are_judged_together_and_each_in_its_own_unit():
    """Plain PyTorch's luck in one draw condemns nobody, but an error of a small draw is seen."""
    eager = off_by(1e-3)
    lucky = {"dx": (off_by(1e-3), TRUTH, TRUTH)}
    usual = {"dx": (off_by(1e-3), eager, TRUTH)}
    with pytest.raises(OutOfBudget):
        assert_within_error_budget(*lucky["dx"])
    assert 0.7 < assert_draws_within_error_budget([lucky, usual], "two draws") < 0.71
    small = {"dx": tuple(1e-6 * t for t in (off_by(1e-2), eager, TRUTH))}
    with pytest.raises(OutOfBudget, match="two draws: dx"):
        assert_draws_within_error_budget([usual, small], "two draws")


def test_python_without_assertions_judges_the_same():
    """`python -O` leaves out `assert`, and the package itself judges by this budget."""
    source = Path(accuracy.__file__).read_text()
    optimized = {"__name__": "accuracy"}
    exec(compile(source, accuracy.__file__, "exec", optimize=1), optimized)
    with pytest.raises(optimized["OutOfBudget"]):
        optimized["assert_within_error_budget"](off_by(1.0), TRUTH, TRUTH)


@pytest.mark.parametrize("inference", [False, True])
def test_tf32_products_cut_what_tensor_cores_do_not_read(inference, monkeypatch):
    one = torch.eye(2)
    finer = one * (1 + 2**-11)
    products = (torch.matmul, torch.nn.functional.linear, lambda a, b: torch.bmm(a[None], b[None]))
    with torch.inference_mode(inference):
        for product in products:
            for allowed, expected in ((True, one), (False, finer)):
                monkeypatch.setattr(accuracy, "allows_tf32", lambda allowed=allowed: allowed)
                with accuracy.tf32_products():
                    assert torch.equal(product(finer, one).view(2, 2), expected)
                    double = product(finer.double(), one.double())
                    assert torch.equal(double.view(2, 2), finer.double())
