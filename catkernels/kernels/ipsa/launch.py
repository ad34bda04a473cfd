"""Launches of the IPSA kernels: the problem as the kernels see it, and the launch tables."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from catkernels.kernels.launch import (
    AMPERE,
    BLACKWELL,
    CDNA,
    HOPPER,
    Launch,
    MapProblem,
    dot_precision,
    pick,
)

# Tokens of a tile: one window of 6 x 6 to 8 x 8 pixels, or several smaller ones.
TILE = 64

# Programs of a launch, about: one wave of the forward kernel on the 132 processors of an H100,
# which hold 4 each, two of the backward kernel. It is the same on every device because the sums
# over a chunk of tiles, and so the bits of the table's gradient, depend on it.
PROGRAMS = 528

# A 16-bit head is a single piece. In float32 a piece of 32 dimensions keeps the tiles of the
# backward kernel within 64 KiB of shared memory (72 KiB with TF32 on Hopper).
MAX_BLOCK_D = {2: 128, 4: 32}

FORWARD = {
    # 4 warps have 16 rows each, the least that a product takes: on Ampere and Hopper more warps
    # would repeat work. Two stages fetch the next window meanwhile, in 28 KiB of shared memory.
    # Blackwell splits a tile over 8 warps, which halves the registers; on CDNA a second stage
    # costs a resident wave.
    "half": {AMPERE: Launch(4, 2), BLACKWELL: Launch(8, 1), CDNA: Launch(4, 1)},
    # two stages would need 104 KiB; 8 warps share the columns of the output
    "wide half": {AMPERE: Launch(8, 1), CDNA: Launch(4, 1)},
    "tf32": {AMPERE: Launch(8, 1)},
    # plain float32 products keep their operands in registers: 16 warps leave room for them
    "ieee": {AMPERE: Launch(16, 1), CDNA: Launch(4, 1)},
}

BACKWARD = {
    # Weights, their gradient and its sum take 96 registers of a thread. That leaves none for a
    # second stage on Ampere; on Hopper it does unless padding or dropout takes them. Two warps
    # would avoid what some versions of ptxas compile wrongly there, but spill 384 bytes and more.
    "half": {AMPERE: Launch(4, 1), HOPPER: Launch(4, 2), BLACKWELL: Launch(8, 1)},
    "padded or dropped half": {AMPERE: Launch(4, 1), BLACKWELL: Launch(8, 1)},
    "wide half": {AMPERE: Launch(8, 1), CDNA: Launch(4, 1)},
    "tf32": {AMPERE: Launch(8, 1)},
    "ieee": {AMPERE: Launch(16, 1), CDNA: Launch(4, 1)},
    # a head of several pieces keeps more between them than 16 warps have registers for
    "ieee in pieces": {AMPERE: Launch(8, 1), CDNA: Launch(4, 1)},
}


@dataclass(frozen=True, kw_only=True)
class Problem(MapProblem):
    """One call of IPSA; its patches are windows."""

    num_heads: int
    head_dim: int
    scale: float

    @classmethod
    def of(
        cls, qkv: Tensor, num_heads: int, patch_size: int, scale: float, dropout_p: float
    ) -> Problem:
        """The problem of a map (B, H, W, 3C), whose device must be the current one."""
        batch, height, width, channels = qkv.shape
        return cls(
            dtype=qkv.dtype,
            device=qkv.device,
            precision=dot_precision(qkv.dtype),
            batch=batch,
            height=height,
            width=width,
            patch_size=patch_size,
            dropout_p=dropout_p,
            num_heads=num_heads,
            head_dim=channels // (3 * num_heads),
            scale=scale,
        )

    @property
    def num_windows(self) -> int:
        return self.batch * self.num_patches

    @property
    def windows_per_tile(self) -> int:
        return TILE // self.patch_size**2

    @property
    def num_chunks(self) -> int:
        """Chunks of tiles; each is one program per head."""
        tiles = -(-self.num_windows // self.windows_per_tile)
        return min(tiles, max(1, PROGRAMS // self.num_heads))

    def arguments(self) -> dict[str, int | float | str]:
        """The arguments by value and the constants that both kernels take."""
        # scores in units of log 2 save a product per weight; float32 would feel their rounding
        score_unit = 1.0 if self.dtype == torch.float32 else math.log2(math.e)
        block_d = max(16, triton.next_power_of_2(self.head_dim))
        return {
            "height": self.height,
            "width": self.width,
            "num_heads": self.num_heads,
            "num_windows": self.num_windows,
            "score_scale": self.scale * score_unit,
            **self.dropout_arguments(),
            "PATCH": self.patch_size,
            "WINDOWS": self.windows_per_tile,
            "TILE": TILE,
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": min(block_d, MAX_BLOCK_D[self.dtype.itemsize]),
            "PADDED": self.padded,
            "PRECISION": self.precision,
            "SCORE_UNIT": score_unit,
        }


def forward_launch(problem: Problem) -> Launch:
    return pick(FORWARD[_kind(problem)], problem)


def backward_launch(problem: Problem) -> Launch:
    kind = _kind(problem)
    if kind == "half" and (problem.padded or problem.dropout_p):
        kind = "padded or dropped half"
    if kind == "ieee" and problem.head_dim > MAX_BLOCK_D[problem.dtype.itemsize]:
        kind = "ieee in pieces"
    return pick(BACKWARD[kind], problem)


def _kind(problem: Problem) -> str:
    if problem.dtype == torch.float32:
        return problem.precision
    return "half" if problem.head_dim <= 64 else "wide half"
