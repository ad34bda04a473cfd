"""One image at a time: the whole model as one CUDA graph."""

from __future__ import annotations

import pytest
import torch
from tiny_models import SERVED
from torch.utils._python_dispatch import TorchDispatchMode

import catkernels
from catkernels import official

pytest.importorskip("triton")


def models(**to) -> list[torch.nn.Module]:
    """Our own CAT, and an official one that was patched."""
    backend = "triton"
    patched = official.CAT(**SERVED)
    catkernels.patch(patched, backend=backend)
    own = catkernels.CAT(**SERVED, backend=backend)
    # nobody waits for gradients here, and a graph would hold the backward pass as well
    return [m.to(**to).eval().requires_grad_(False) for m in (own, patched)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose graph it is")
@pytest.mark.parametrize("which", [0, 1], ids=["own", "patched"])
def test_a_graphed_model_gives_the_bits_of_the_model(which):
    model = models(device="cuda", dtype=torch.bfloat16)[which]
    images = torch.randn(4, 1, 3, 56, 56, device="cuda", dtype=torch.bfloat16)
    expected = [model(image).clone() for image in images]
    graphed = torch.cuda.make_graphed_callables(model, (images[0],))
    for image, logits in zip(images, expected, strict=True):
        assert torch.equal(graphed(image), logits)


class Called(TorchDispatchMode):
    """Remembers the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.operators.add(str(operator.overloadpacket))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("which", [0, 1], ids=["own", "patched"])
def test_nothing_waits_for_the_device_in_what_is_captured(which):
    """A value that the host asks for, or sends, cannot be part of a graph."""
    model = models(dtype=torch.float32)[which]
    with Called() as called:
        model(torch.randn(1, 3, 56, 56))
    assert {"catkernels.ipsa_forward", "catkernels.cpsa_forward"} <= called.operators
    waiting = {"aten._local_scalar_dense", "aten.nonzero", "aten._to_copy", "aten.lift_fresh"}
    assert not waiting & called.operators
