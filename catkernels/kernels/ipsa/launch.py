"""Launches of the IPSA kernels: the problem as the kernels see it, and the launch tables."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from catkernels.kernels.launch import (
    AMPERE,
    BLACKWELL,
    CDNA,
    HOPPER,
    Launch,
    MapProblem,
    dot_precision,
    next_power_of_2,
    pick,
)
from catkernels.reference import ceil_div

# Tokens of a tile: one window of 6 x 6 to 8 x 8 pixels, or several smaller ones.
TILE = 64

# A 16-bit head is a single piece. In float32 a piece of 32 dimensions keeps the tiles of the
# backward kernel within 64 KiB of shared memory (72 KiB with TF32 on Hopper).
MAX_BLOCK_D = {2: 128, 4: 32}


@dataclass(frozen=True)
class ChunkLaunch(Launch):
    """A launch of programs that each take a chunk of the tiles.

    Programs are about one wave where that is known: the multiprocessors of an A100 (108), an H100
    (132) or a B200 (148), times those that one holds. How many the backward kernel has decides on
    the order of sums, and so on the bits of the table's gradient, for each architecture.
    """

    num_programs: int  # about, of all heads

    def num_chunks(self, problem: Problem) -> int:
        """Chunks of tiles; each is one program per head."""
        tiles = ceil_div(problem.num_windows, problem.windows_per_tile)
        return min(tiles, max(1, self.num_programs // problem.num_heads))


# Two stages would fetch nothing ahead: the loop waits for all its copies, multiplies, and only then
# issues the next. With three the next tile is on its way during the products.
FORWARD = {
    # 4 warps have 16 rows each, the least that a product takes: on Ampere and Hopper more warps
    # would repeat work. Three stages of a head of 32 take 28 KiB of shared memory on Ampere, which
    # leaves 3 resident programs where there are 99 KiB, and 40 KiB on Hopper, room for 5 where the
    # registers allow 4. Blackwell splits a tile over 8 warps, which halves the registers; on CDNA
    # a second stage costs a resident wave.
    "half": {
        AMPERE: ChunkLaunch(4, 3, 432),
        HOPPER: ChunkLaunch(4, 3, 528),
        BLACKWELL: ChunkLaunch(8, 1, 296),
        CDNA: ChunkLaunch(4, 1, 528),
    },
    # heads of 33 to 64: three stages are 80 KiB on Hopper, where two programs are resident, and
    # 56 KiB on Ampere, where 99 KiB would hold one
    "long half": {
        AMPERE: ChunkLaunch(4, 1, 432),
        HOPPER: ChunkLaunch(4, 3, 528),
        BLACKWELL: ChunkLaunch(8, 1, 296),
        CDNA: ChunkLaunch(4, 1, 528),
    },
    # two stages would need 104 KiB; 8 warps share the columns of the output
    "wide half": {AMPERE: ChunkLaunch(8, 1, 528), CDNA: ChunkLaunch(4, 1, 528)},
    "tf32": {AMPERE: ChunkLaunch(8, 1, 528)},
    # plain float32 products keep their operands in registers: 16 warps leave room for them
    "ieee": {AMPERE: ChunkLaunch(16, 1, 528), CDNA: ChunkLaunch(4, 1, 528)},
}

BACKWARD = {
    # Weights, their gradient and its sum take 96 registers of a thread. With three stages that
    # spills on Ampere (8 to 24 bytes; with dropout 144 to 200); on Hopper it does not, in 57 KiB
    # with two resident programs, but for dropout under Triton 3.6 (16 bytes). Two warps would have
    # no asynchronous products, but spill 384 bytes and more.
    "half": {
        AMPERE: ChunkLaunch(4, 1, 216),
        HOPPER: ChunkLaunch(4, 3, 264),
        BLACKWELL: ChunkLaunch(8, 1, 296),
        CDNA: ChunkLaunch(4, 1, 528),
    },
    # what padding adds spills with three stages on Hopper as well (16 to 24 bytes)
    "padded half": {
        AMPERE: ChunkLaunch(4, 1, 216),
        HOPPER: ChunkLaunch(4, 1, 264),
        BLACKWELL: ChunkLaunch(8, 1, 296),
        CDNA: ChunkLaunch(4, 1, 528),
    },
    "wide half": {AMPERE: ChunkLaunch(8, 1, 264), CDNA: ChunkLaunch(4, 1, 528)},
    "tf32": {AMPERE: ChunkLaunch(8, 1, 264)},
    "ieee": {AMPERE: ChunkLaunch(16, 1, 264), CDNA: ChunkLaunch(4, 1, 528)},
    # a head of several pieces keeps more between them than 16 warps have registers for
    "ieee in pieces": {AMPERE: ChunkLaunch(8, 1, 264), CDNA: ChunkLaunch(4, 1, 528)},
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
    def wide(self) -> bool:
        """Whether offsets into one window need 64 bits."""
        return self.patch_size * self.width * 3 * self.num_heads * self.head_dim >= 2**31

    def arguments(self) -> dict[str, int | float | str]:
        """The arguments by value and the constants that both kernels take."""
        # scores in units of log 2 save a product per weight; float32 would feel their rounding
        score_unit = 1.0 if self.dtype == torch.float32 else math.log2(math.e)
        block_d = max(16, next_power_of_2(self.head_dim))
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
            "WIDE": self.wide,
            "PRECISION": self.precision,
            "SCORE_UNIT": score_unit,
        }


def forward_launch(problem: Problem) -> ChunkLaunch:
    kind = _kind(problem)
    if kind == "half" and problem.head_dim > 32:
        kind = "long half"
    return pick(FORWARD[kind], problem)


def backward_launch(problem: Problem) -> ChunkLaunch:
    kind = _kind(problem)
    if kind == "half" and problem.padded:
        kind = "padded half"
    if kind == "ieee" and problem.head_dim > MAX_BLOCK_D[problem.dtype.itemsize]:
        kind = "ieee in pieces"
    return pick(BACKWARD[kind], problem)


def _kind(problem: Problem) -> str:
    if problem.dtype == torch.float32:
        return problem.precision
    return "half" if problem.head_dim <= 64 else "wide half"
