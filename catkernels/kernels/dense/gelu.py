"""GELU and its slope: exact, or so near to it that half precision sees no difference."""

import triton
import triton.language as tl


@triton.jit
def gelu(h, EXACT: tl.constexpr):
    """``h Phi(h)``; unless EXACT, off by 1.3e-6 at most."""
    if EXACT:
        y = 0.5 * h * (1.0 + tl.math.erf(h * 0.7071067811865476))
    else:
        size = tl.abs(h)
        y = tl.maximum(h, 0.0) - size * _normal_tail(size)
    return y


@triton.jit
def gelu_and_slope(h, EXACT: tl.constexpr):
    """``h Phi(h)`` and its derivative ``Phi(h) + h phi(h)``."""
    if EXACT:
        probability = 0.5 * (1.0 + tl.math.erf(h * 0.7071067811865476))
    else:
        tail = _normal_tail(tl.abs(h))
        probability = tl.where(h >= 0, 1.0 - tail, tail)
    # e^(-h^2 / 2) as a power of two, over sqrt(2 pi)
    density = tl.exp2(h * h * -0.7213475204444817) * 0.3989422804014327
    return h * probability, probability + h * density


@triton.jit
def _normal_tail(size):
    """``Phi(-size)`` for ``size >= 0``: two to a polynomial whose leading coefficient is negative.

    Fitted such that ``size`` times it is off by 1.3e-6 at most, and zero for any large size. The
    exact erf would make the loop of the MLP's kernel 2.5 times as long.
    """
    log2 = -3.979186003562063e-4 * size + 6.588885094970465e-3
    log2 = log2 * size - 5.0673432648181915e-2
    log2 = log2 * size - 4.611477255821228e-1
    log2 = log2 * size - 1.1503124237060547
    log2 = log2 * size - 1.0000970363616943
    return tl.exp2(log2)
