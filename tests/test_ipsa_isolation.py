"""Values that are not finite: what one window of IPSA's kernels holds reaches no other.

Several windows share a tile at N <= 5, and zero times NaN is NaN.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from kernel_cases import FP16, FP32, NAMED
from torch import Tensor

from catkernels.cases import IPSACase, converted, random_grad, results

pytestmark = [
    pytest.mark.usefixtures("round_to_nearest_bf16", "launches"),
    # the interpreter's, of values that are not finite
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning"),
]

# each in an image of its own; one more image is clean
POISONS = list(itertools.product(("query", "key", "value", "gradient"), (math.nan, math.inf)))
BATCH = len(POISONS) + 1
CASES = [
    IPSACase("N1", BATCH, 2, 3, patch_size=1),
    IPSACase("N2", BATCH, 4, 2, patch_size=2),
    IPSACase("N2-padded", BATCH, 3, 3, patch_size=2),
    IPSACase("N3", BATCH, 3, 6, patch_size=3),
    IPSACase("N3-padded", BATCH, 3, 5, patch_size=3),
    IPSACase("N4", BATCH, 4, 8, patch_size=4),
    IPSACase("N4-padded", BATCH, 6, 3, patch_size=4),
    IPSACase("N5", BATCH, 5, 5, patch_size=5),
    IPSACase("N5-padded", BATCH, 7, 4, patch_size=5),
    replace(NAMED["padded"], batch=BATCH),
]
PACKED = {case.name: case for case in CASES}["N4-padded"]
IN_PIECES = replace(PACKED, name="in-pieces", head_dim=48, num_heads=1)
DROPOUT = replace(PACKED, name="dropout", dropout_p=0.5)


def calls():
    """Every case in float32 and in half precision, half of them with `--full` only."""
    sampled = ["N1", "N2-padded", "N3", "N4-padded", "N5-padded"]
    for case in CASES:
        yield pytest.param(case, FP32, marks=() if case.name in sampled else pytest.mark.full)
        yield pytest.param(case, FP16, marks=() if case.name == "N5" else pytest.mark.full)
    yield from [(IN_PIECES, FP32), (DROPOUT, FP16)]


def poisoned(case: IPSACase, qkv: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Copies with one value of each of the first images spoilt, and which windows' pixels."""
    qkv, grad_out = qkv.clone(), grad_out.clone()
    touched = torch.zeros(qkv.shape[:3], dtype=torch.bool, device=qkv.device)
    for image, (place, value) in enumerate(POISONS):
        # the last window of an image, in the first images the first one
        y, x = (side - 1 if image > 1 else 0 for side in (case.height, case.width))
        tensor = grad_out if place == "gradient" else qkv
        third = {"key": 1, "value": 2}.get(place, 0)
        tensor[image, y, x, third * case.num_heads * case.head_dim + 5] = value
        top, left = (corner - corner % case.patch_size for corner in (y, x))
        touched[image, top : top + case.patch_size, left : left + case.patch_size] = True
    return qkv, grad_out, touched


@pytest.mark.parametrize(("case", "dtype"), list(calls()), ids=str)
def test_stays_in_its_window(case, dtype, device):
    inputs = case.inputs(dtype, device)
    grad_out = random_grad(case.shape, inputs["qkv"])
    torch.manual_seed(0)
    clean = results(case.attend, inputs, grad_out)
    inputs["qkv"], grad_out, touched = poisoned(case, inputs["qkv"], grad_out)
    torch.manual_seed(0)
    actual = results(case.attend, inputs, grad_out)
    for name in ("out", "dqkv"):
        assert torch.equal(actual[name][~touched], clean[name][~touched]), name
    if case.dropout_p:
        return
    specified = results(case.specified, converted(inputs, torch.float64), grad_out.double())
    for name, kind in itertools.product(("out", "dqkv"), (torch.isnan, torch.isinf)):
        assert torch.equal(kind(actual[name]), kind(specified[name])), (name, kind)
