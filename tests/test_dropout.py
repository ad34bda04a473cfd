"""What dropout keeps, restated: by the generator's published answers, place by place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from catkernels.dropout import SameDropout, kept, philox

# of Random123, the paper's own implementation (kat_vectors, philox4x32 10): counter, key, answer
PUBLISHED = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), PUBLISHED)
def test_philox_gives_the_published_words(counter, key, answer):
    words = philox(key[0] | key[1] << 32, *(np.array(c) for c in counter))
    assert tuple(words) == answer


def test_so_many_are_kept():
    keep = kept(1, 0.3, rows=49, columns=49, heads=3, sequences=40)
    assert keep.shape == (40, 3, 49, 49)
    assert keep.float().mean() == pytest.approx(0.7, abs=0.005)


def test_a_weight_is_kept_wherever_its_row_is_looked_at_from():
    """Bits are counted by place, so that fewer columns or sequences draw the same."""
    keep = kept(1, 0.5, rows=9, columns=49, heads=2, sequences=3)
    part = kept(1, 0.5, rows=4, columns=13, heads=1, sequences=2)
    assert torch.equal(part, keep[:2, :1, :4, :13])
    assert not torch.equal(kept(2, 0.5, rows=9, columns=49, heads=2, sequences=3), keep)


def test_nothing_is_dropped_at_zero():
    assert kept(1, 0.0, rows=5, columns=5, heads=1, sequences=1).all()


@pytest.mark.parametrize("call", [lambda x: F.dropout(x, 0.3), lambda x: F.dropout(input=x, p=0.3)])
def test_plain_pytorch_drops_the_same_and_the_kernels_are_given_the_seed(call):
    keep = kept(7, 0.3, rows=4, columns=6, heads=2, sequences=3)
    weights = torch.rand(3, 2, 4, 6, requires_grad=True)
    with SameDropout(7, keep):
        dropped = call(weights)
        seed = torch.randint(2**63 - 1, (1,))
    assert seed.tolist() == [7]
    # the probability in steps of 2**-16
    scale = 1 / (1 - round(0.3 * 2**16) / 2**16)
    torch.testing.assert_close(dropped, weights * keep * scale)
    (gradient,) = torch.autograd.grad(dropped.sum(), weights)
    torch.testing.assert_close(gradient, keep * scale)
