"""Which backend serves a call, and what is said where the kernels cannot."""

from __future__ import annotations

import pytest
import torch

from catkernels.choice import choose_kernels

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("backend", "device", "reasons", "kernels"),
    [
        ("auto", GPU, [], True),
        ("auto", GPU, ["it is too large"], False),
        ("auto", CPU, [], False),
        ("triton", GPU, [], True),
        ("triton", CPU, [], True),
        ("reference", GPU, [], False),
        ("reference", GPU, ["it is too large"], False),
    ],
)
def test_kernels_serve_where_they_can_and_on_a_cpu_on_request(backend, device, reasons, kernels):
    assert choose_kernels("ipsa_attention", backend, device, reasons) is kernels


def test_the_kernels_asked_for_or_every_reason_why_not():
    reasons = ["it is too large", "it is too old"]
    with pytest.raises(ValueError, match="it is too large; it is too old") as error:
        choose_kernels("cpsa_attention", "triton", GPU, reasons)
    assert "cpsa_attention cannot use backend='triton'" in str(error.value)
    assert "backend='auto' or 'reference'" in str(error.value)


def test_no_such_backend():
    with pytest.raises(ValueError, match="one of auto, triton, reference, got 'gpu'"):
        choose_kernels("ipsa_attention", "gpu", GPU, [])
