"""How IPSA's results are judged in its tests, and the calls that most of them take."""

from __future__ import annotations

import torch
from torch import Tensor

from catkernels import cases
from catkernels.accuracy import assert_draws_within_error_budget
from catkernels.cases import IPSA_CASES, Inputs, IPSACase, converted, results

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INPUTS = ("qkv", "bias_table", "qkv_bias")
NAMED = {case.name: case for case in IPSA_CASES}
PLAIN, PADDED, PACKED = NAMED["plain"], NAMED["padded"], NAMED["N4-padded"]


def random_grad(case: IPSACase, like: Tensor, seed: int = 0) -> Tensor:
    return cases.random_grad(case.shape, like, seed)


def check(*draws: tuple[IPSACase, Inputs]) -> None:
    """Compare outputs and all gradients with float64; plain PyTorch computes in qkv's dtype."""
    compared = []
    for seed, (case, inputs) in enumerate(draws):
        qkv = inputs["qkv"]
        grad_out = random_grad(case, qkv, seed)
        actual = results(case.attend, inputs, grad_out)
        same_dtype = results(case.specified, converted(inputs, qkv.dtype), grad_out)
        float64 = results(case.specified, converted(inputs, torch.float64), grad_out.double())
        assert actual.keys() == float64.keys()
        for name, result in actual.items():
            assert result.dtype == inputs.get(name.removeprefix("d"), qkv).dtype, name
        compared.append({name: (actual[name], same_dtype[name], float64[name]) for name in actual})
    assert_draws_within_error_budget(compared, str(draws[0][0]))


def draws(case: IPSACase, dtype: torch.dtype, device: torch.device):
    """Inputs of one case, several of them where they cost nothing."""
    number = 4 if device.type == "cuda" else 1
    return [(case, case.inputs(dtype, device, seed=seed)) for seed in range(number)]
