"""Launches of the CPSA kernels: the problem as the kernels see it, and the launch tables.

The reasons are resources of kernels that Triton compiled: a thread has 255 registers, and what
spills goes to memory. tests/data/cpsa_resources_triton_*.csv records those of the configurations
that tests/test_cpsa_resources.py names, for the versions of Triton in the files' names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
from torch import Tensor

from catkernels.kernels.launch import (
    AMPERE,
    CDNA,
    Launch,
    MapProblem,
    dot_precision,
)

TILE = 64  # tokens of a tile, and the most patches that a tile holds

# Persistent programs of a backward pass, each with its own sum of the weights' gradients: two for
# each multiprocessor of an H100, on every device, so that the order of sums is always the same.
PROGRAMS = 264

# Large maps are copied to tokens and back in blocks of 16 patches of 16 channels: whole sectors of
# 32 bytes of the map, 128 bytes of a token.
COPY_PATCHES, COPY_CHANNELS = 16, 16


# The ways of CPSA's kernels: from tiles of the map, from tokens of which a tile holds whole
# sequences, or from tokens in blocks, as FlashAttention takes them.
Route = Literal["map", "tokens", "flash"]


@dataclass(frozen=True, kw_only=True)
class Problem(MapProblem):
    """One call of CPSA, computed in ``dtype``, which need not be the map's."""

    channels: int

    @classmethod
    def of(cls, x: Tensor, dtype: torch.dtype, patch_size: int, dropout_p: float) -> Problem:
        """The problem of a map (B, H, W, C), whose device must be the current one."""
        batch, height, width, channels = x.shape
        return cls(
            dtype=dtype,
            device=x.device,
            precision=dot_precision(dtype),
            batch=batch,
            height=height,
            width=width,
            patch_size=patch_size,
            dropout_p=dropout_p,
            channels=channels,
        )

    @property
    def num_sequences(self) -> int:
        return self.batch * self.channels

    @property
    def wide(self) -> bool:
        """Whether offsets into one image need 64 bits."""
        return self.height * self.width * self.channels >= 2**31

    def map_arguments(self) -> dict[str, int | bool]:
        """The arguments of kernels that address the map."""
        return {
            "height": self.height,
            "width": self.width,
            "num_patches": self.num_patches,
            "CHANNELS": self.channels,
            "PATCH": self.patch_size,
            "PADDED": self.padded,
            "WIDE": self.wide,
        }

    def token_arguments(self) -> dict[str, int]:
        """The arguments of kernels that address tokens."""
        return {"num_channels": self.channels, "num_patches": self.num_patches}

    def attention_arguments(self) -> dict[str, int | float | str]:
        """The arguments of kernels that attend."""
        return {**self.dropout_arguments(), "PRECISION": self.precision}


def forward_route(problem: Problem) -> Route:
    """Which kernels serve a forward pass."""
    if problem.num_patches > TILE:
        return "flash"
    patches = triton.next_power_of_2(problem.num_patches)
    if problem.dtype == torch.float32:
        # two groups of float32 spill
        return "map" if patches <= 16 else "flash"
    # on Ampere eight groups spill (104 bytes)
    return "flash" if patches == TILE and problem.architecture == AMPERE else "map"


def backward_route(problem: Problem) -> Route:
    """Which kernels serve a backward pass."""
    if problem.num_patches > TILE:
        return "flash"
    # a map tile of more patches has too many groups
    return "map" if problem.num_patches <= 16 else "tokens"


@dataclass(frozen=True)
class TileLaunch(Launch):
    """How a kernel is launched on tiles of the map."""

    block_c: int
    patches_low: int  # of a tile's patches, those whose pixels different threads may own
    patches_high: int = 1  # times as many, which one thread owns
    reload: bool = False

    def constants(self) -> dict[str, int | bool]:
        return {
            "BLOCK_C": self.block_c,
            "PATCHES_HIGH": self.patches_high,
            "PATCHES_LOW": self.patches_low,
            "RELOAD": self.reload,
            **super().constants(),
        }


def forward_launch(problem: Problem) -> TileLaunch:
    """The launch of the forward kernel on map tiles."""
    arch = problem.architecture
    patches = triton.next_power_of_2(problem.num_patches)
    # 16 bytes of neighbouring channels, or more where a tile holds more channels
    block_c = max(16 // problem.dtype.itemsize, TILE // patches)
    if problem.dtype == torch.float32:
        # exact products want the registers of twice the threads
        return TileLaunch(8, 1, block_c, patches)
    # Ampere keeps operands in registers: each use fetches the weights anew
    reload = arch == AMPERE
    if patches < TILE:
        return TileLaunch(4, 1, block_c, patches, reload=reload)
    # Patches that one thread owns keep the operands' stores to shared memory at 16 bytes. Four
    # warps would spill on NVIDIA (240 bytes), eight on CDNA.
    num_warps, patches_high = (4, 4) if arch == CDNA else (8, 2)
    return TileLaunch(num_warps, 1, block_c, patches // patches_high, patches_high)


@dataclass(frozen=True)
class BackwardPass:
    """One launch of a backward kernel: the gradients it gives, and how it is launched."""

    gives: tuple[str, ...]  # "x", "score" and "value": x, A with u, M with the constants
    block_c: int = 1
    patches: int = TILE
    num_warps: int = 4

    def is_needed(self, needs_x: bool, needs_weights: bool) -> bool:
        return (needs_x and "x" in self.gives) or (needs_weights and self.gives != ("x",))

    def constants(self, needs_x: bool, needs_weights: bool) -> dict:
        return {
            "GIVE_X": needs_x and "x" in self.gives,
            "GIVE_SCORE": needs_weights and "score" in self.gives,
            "GIVE_VALUE": needs_weights and "value" in self.gives,
            "num_warps": self.num_warps,
            "num_stages": 1,
        }

    def map_constants(self, needs_x: bool, needs_weights: bool) -> dict:
        return {
            "BLOCK_C": self.block_c,
            "PATCHES_HIGH": 1,
            "PATCHES_LOW": self.patches,
            **self.constants(needs_x, needs_weights),
        }


def backward_passes(problem: Problem) -> tuple[BackwardPass, ...]:
    """The passes that together give all gradients, for up to 64 patches.

    One pass multiplies least, but holds both sums of the weights' gradients beside the products.
    """
    arch, dtype = problem.architecture, problem.dtype
    patches = triton.next_power_of_2(problem.num_patches)
    one_group = TILE // patches
    block_c = max(16 // dtype.itemsize, one_group)
    if patches == 1:
        return (BackwardPass(("x", "score", "value"), block_c, patches),)
    if arch == AMPERE or dtype == torch.float32:
        # In one pass half precision spills 360 to 790 bytes on Ampere, TF32 24 to 1180 on Hopper.
        # On Ampere the scores of two groups spill even alone (320 bytes), and TF32 spills in each
        # pass: with eight warps up to 170 bytes, of the scores 540, with four 250 and 740. (Triton
        # 3.6 has 1.9 KB for the scores of tokens on sm_80, with four warps 1.6 KB.)
        num_warps = 8 if arch == AMPERE and dtype == torch.float32 else 4
        return (
            BackwardPass(("x",), block_c, patches, num_warps),
            BackwardPass(("score",), one_group, patches, num_warps),
            BackwardPass(("value",), block_c, patches, num_warps),
        )
    # One group spills nothing, at the price of map accesses of 64 bits at 16 patches. Two take
    # several passes, and so twice the map's traffic: on Hopper 390 bytes are spilt in one pass, and
    # on Blackwell Triton 3.6 compiles them to a trap.
    return (BackwardPass(("x", "score", "value"), one_group, patches),)


@dataclass(frozen=True)
class FlashLaunch(Launch):
    """How a flash kernel is launched."""

    block_q: int
    block_k: int

    def constants(self) -> dict[str, int]:
        return {"BLOCK_Q": self.block_q, "BLOCK_K": self.block_k, **super().constants()}


def flash_forward_launch(problem: Problem) -> FlashLaunch:
    if problem.dtype == torch.float32:
        # float32 products take registers that only twice the threads have
        return FlashLaunch(8, 1, 64, 64)
    return FlashLaunch(4, 2, 64, 64)


def flash_backward_launch(problem: Problem) -> FlashLaunch:
    if problem.dtype == torch.float32:
        # with 64 keys the queries' pass spills (168 bytes on Hopper)
        return FlashLaunch(8, 1, 64, 32)
    # with 64 queries the keys' pass spills on Ampere (16 bytes)
    return FlashLaunch(4, 1, 32 if problem.architecture == AMPERE else 64, 64)


def flash_weights_launch(problem: Problem) -> Launch:
    if problem.dtype == torch.float32:
        return Launch(8, 1)
    # on Ampere, fetching ahead frees registers (16 bytes are spilt without it)
    return Launch(4, 2 if problem.architecture == AMPERE else 1)
