"""How the kernels of both attentions are judged, and the calls that most of their tests take."""

from __future__ import annotations

import torch
from torch import Tensor

from catkernels.accuracy import assert_draws_within_error_budget, tf32_products
from catkernels.cases import IPSA_CASES, Inputs, converted, random_grad, results
from catkernels.families import Case
from catkernels.reference import ceil_div

FP32, FP16, BF16 = DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMED = {case.name: case for case in IPSA_CASES}
PLAIN, PADDED, PACKED = NAMED["plain"], NAMED["padded"], NAMED["N4-padded"]


def check(*draws: tuple[Case, Inputs], grad_out: Tensor | None = None) -> None:
    """Judge outputs and all gradients by the error budget, several draws together."""
    found = [compared(*draw, grad_out, seed) for seed, draw in enumerate(draws)]
    assert_draws_within_error_budget(found, str(draws[0][0]))


def compared(
    case: Case, inputs: Inputs, grad_out: Tensor | None = None, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Results by the kernels, by plain PyTorch in the map's dtype, and in float64."""
    image_map = next(iter(inputs.values()))
    if grad_out is None:
        grad_out = random_grad(case.shape, image_map, seed)
    actual = results(case.attend, inputs, grad_out)
    with tf32_products():
        same_dtype = results(case.specified, converted(inputs, image_map.dtype), grad_out)
    float64 = results(case.specified, converted(inputs, torch.float64), grad_out.double())
    assert actual.keys() == float64.keys()
    for name, result in actual.items():
        assert result.dtype == inputs.get(name.removeprefix("d"), image_map).dtype, name
    return {name: (actual[name], same_dtype[name], float64[name]) for name in actual}


def draws(case: Case, dtype: torch.dtype, device: torch.device) -> list[tuple[Case, Inputs]]:
    """Inputs of one case, several of them where they cost nothing or are few numbers.

    Of few, plain PyTorch's largest error is now and then a fraction of what it is on average, and
    so is the budget.
    """
    least = 4 if device.type == "cuda" else 1
    number = max(least, ceil_div(2048, torch.Size(case.shape.size).numel()))
    return [(case, case.inputs(dtype, device, seed=seed)) for seed in range(number)]
