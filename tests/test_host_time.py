"""What a served block costs the host, which a GPU waits for at small batches: calls, not seconds.

A processor's time is noisy and another machine's; how many Python functions a call goes through,
PyTorch's among them, is neither. One takes about 0.3 us.
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from catkernels import official
from catkernels.patching.patch import patch


@pytest.fixture
def kernels_do_nothing(monkeypatch):
    pytest.importorskip("triton")
    from catkernels.kernels.tiles import dot as any_jit_function

    monkeypatch.setattr(type(any_jit_function), "run", lambda kernel, *args, **kwargs: None)


def functions_called(call) -> int:
    """How many functions a call goes through."""
    count = 0

    def listen(frame, event, argument):
        nonlocal count
        code = frame.f_code
        # what is between brackets is a function in some versions of Python
        count += event == "call" and code.co_name[0] != "<"

    call()  # what is looked up once is looked up now
    sys.setprofile(listen)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


# Functions in inference and in training, a tenth above what they were when this was written.
MOST = {
    ("ipsa", torch.bfloat16): (545, 730),
    ("cpsa", torch.bfloat16): (445, 685),
    ("ipsa", torch.float32): (585, 785),
    ("cpsa", torch.float32): (555, 795),
}


@pytest.mark.usefixtures("kernels_do_nothing")
@pytest.mark.parametrize(("attention", "dtype"), MOST)
def test_a_served_block_goes_through_few_functions(attention, dtype):
    theirs = official.CATBlock(
        32, None, 2, 7, 4.0, True, None, 0.0, 0.0, 0.0, nn.LayerNorm, attention
    )
    model = nn.Sequential(theirs)
    patch(model, backend="triton", compare=False)
    block = model[0].to(dtype)
    block.H, block.W = 7, 14
    x = torch.randn(1, 98, 32, dtype=dtype)
    called = []
    for trains in (False, True):
        block.train(trains)
        with torch.set_grad_enabled(trains):
            called.append(functions_called(lambda: block(x)))
    assert all(n <= most for n, most in zip(called, MOST[attention, dtype], strict=True)), called
