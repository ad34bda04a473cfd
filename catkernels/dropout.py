"""Which attention weights the kernels' dropout keeps, restated in NumPy.

A kernel decides by 16 random bits of Philox 4x32-10, counted by the weight's place, so that its
backward pass draws the same again. Here the same bits are drawn for a reference to be judged by.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from catkernels.reference import ceil_div


def kept(
    seed: int, dropout_p: float, rows: int, columns: int, heads: int, sequences: int
) -> Tensor:
    """The weights that the kernels' dropout keeps: bool (sequences, heads, rows, columns)."""
    groups = ceil_div(columns, 8)
    words = philox(
        seed,
        np.arange(groups),
        np.arange(rows)[:, None],
        np.arange(heads)[:, None, None],
        np.arange(sequences)[:, None, None, None],
    )
    halves = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], -1)
    keep = halves >= round(dropout_p * 2**16)
    return torch.from_numpy(keep.reshape(sequences, heads, rows, groups * 8)[..., :columns])


def philox(seed: int, *counter: np.ndarray) -> np.ndarray:
    """The four 32-bit words of Philox 4x32-10 at a counter of four broadcastable integer arrays.

    Returns:
        (*counter, 4), uint64.
    """
    word = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, np.uint64) & word for c in counter))
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        product0, product2 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (product2 >> half) ^ c1 ^ np.uint64(k0),
            product2 & word,
            (product0 >> half) ^ c3 ^ np.uint64(k1),
            product0 & word,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], -1)


class SameDropout(TorchFunctionMode):
    """A context in which the kernels draw ``seed``, and `F.dropout` drops what they drop with it.

    Args:
        seed: what `torch.randint` gives.
        keep: bool, in the shape of the weights that `F.dropout` gets.
    """

    def __init__(self, seed: int, keep: Tensor) -> None:
        super().__init__()
        self.seed, self.keep = seed, keep

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.randint:
            return torch.tensor([self.seed], device=kwargs.get("device"))
        if function is F.dropout:
            # which hands its input over by place and all else by name
            return self._dropped(args[0], kwargs["p"])
        return function(*args, **kwargs)

    def _dropped(self, weights: Tensor, dropout_p: float) -> Tensor:
        # the kernels round the probability to their 16 bits
        keep_scale = 1 / (1 - round(dropout_p * 2**16) / 2**16)
        return weights * self.keep.to(weights.device) * keep_scale
