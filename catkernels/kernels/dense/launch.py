"""Launches of the kernels of a block's norms, MLP and linear layers."""

from __future__ import annotations

from dataclasses import dataclass

import triton
from torch import Tensor

from catkernels.kernels.launch import Launch, Problem

# A norm's tile has 16 values a thread, which leaves 128 registers enough and so room for 4 programs
# a processor: the 48 KiB that they fetch at once keep an H100's memory busy.
NORM_TILE = 2048

# Programs of a norm's backward pass, about: one wave on the 132 processors of an H100, which hold 4
# each. It is the same on every device because the sums over a chunk of tiles, and so the bits of
# the gradients of weight and bias, depend on it.
NORM_PROGRAMS = 528


@dataclass(frozen=True, kw_only=True)
class NormProblem(Problem):
    """Rows to be normed, whatever the norm is computed for; products there are none."""

    num_rows: int
    channels: int

    @classmethod
    def of(cls, x: Tensor) -> NormProblem:
        """The problem of a tensor (.., C)."""
        return cls(
            dtype=x.dtype,
            device=x.device,
            precision="ieee",
            num_rows=x.shape[:-1].numel(),
            channels=x.shape[-1],
        )

    @property
    def block_c(self) -> int:
        return triton.next_power_of_2(self.channels)

    def arguments(self, eps: float) -> dict[str, int | float]:
        """The arguments by value and the constants that both kernels take."""
        return {
            "num_rows": self.num_rows,
            "eps": eps,
            "C": self.channels,
            "BLOCK_C": self.block_c,
        }


@dataclass(frozen=True)
class NormLaunch(Launch):
    """How a norm is launched: rows of a tile."""

    rows: int

    def constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, **super().constants()}


def norm_launch(problem: NormProblem) -> NormLaunch:
    """The launch of a norm, forward and backward."""
    return NormLaunch(4, 1, rows=NORM_TILE // problem.block_c)
