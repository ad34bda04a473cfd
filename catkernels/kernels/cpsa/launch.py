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
    BLACKWELL,
    CDNA,
    HOPPER,
    Launch,
    MapProblem,
    dot_precision,
    next_power_of_2,
)

_TRITON = tuple(map(int, triton.__version__.split(".")[:2]))

TILE = 64  # tokens of a tile, and the most patches that a tile holds

# Persistent programs of a backward pass, each with its own sum of the weights' gradients: two for
# each multiprocessor of an H100, on every device, so that the order of sums is always the same.
PROGRAMS = 264

# Large maps are copied to tokens and back in blocks of 16 patches of 16 channels: whole sectors of
# 32 bytes of the map, 128 bytes of a token.
COPY_PATCHES, COPY_CHANNELS = 16, 16


# The ways of CPSA's kernels: from tiles of the map, each of which holds whole sequences, or from
# tokens in blocks, as FlashAttention takes them.
Route = Literal["map", "flash"]


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
    def fills_tiles(self) -> bool:
        """Whether the patches are as many as a tile of them holds: a power of two."""
        return next_power_of_2(self.num_patches) == self.num_patches

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


def route(problem: Problem, backward: bool) -> Route:
    """Which kernels serve a pass.

    Map tiles hold up to 64 patches, of less than 8 x 8 pixels: their constants want a coordinate
    that no pixel takes.
    """
    if problem.num_patches > TILE or problem.patch_size >= 8:
        return "flash"
    if problem.num_patches > 16 and _most_groups(problem, backward) == 1:
        # a group is then one or two channels: 2 or 4 bytes of each sector of 32
        return "flash"
    return "map"


def _most_groups(problem: Problem, backward: bool) -> int:
    """The most groups of 64 tokens that a map tile can have."""
    arch = problem.architecture
    if problem.dtype == torch.float32:
        return 1
    if not backward:
        # Hopper's and Blackwell's registers take eight, Ampere's four; CDNA's at half the occupancy
        return 8 if arch in (HOPPER, BLACKWELL) else 4
    if arch == BLACKWELL and _TRITON < (3, 8):
        # does not share tensor memory: two groups would take 736 columns of 512
        return 1
    # In shared memory wait as many groups as leave room for a second program. Two groups spill on
    # Ampere (620 bytes for the gradient of x alone), four on CDNA (130 bytes).
    return {HOPPER: 4, BLACKWELL: 4, CDNA: 2}.get(arch, 1)


def _block_c(problem: Problem, backward: bool) -> int:
    """Channels of a map tile: 16 bytes of neighbours if it may have so many groups, or a group."""
    one_group = TILE // next_power_of_2(problem.num_patches)
    most = _most_groups(problem, backward) * one_group
    return max(min(16 // problem.dtype.itemsize, most), one_group)


@dataclass(frozen=True)
class TileLaunch(Launch):
    """How a kernel is launched on tiles of the map."""

    block_c: int
    patches_high: int  # of a tile's patches, those that one thread owns
    patches_low: int  # times as many, whose pixels different threads own

    @classmethod
    def of(cls, problem: Problem, block_c: int, num_warps: int, **options) -> TileLaunch:
        """A launch that fetches nothing in stages, on tiles of ``block_c`` channels."""
        patches = next_power_of_2(problem.num_patches)
        # of 16 patches a thread's share is the rows of 8 pixels
        return cls(num_warps, 1, block_c, max(patches // 16, 1), min(patches, 16), **options)

    def constants(self) -> dict[str, int | bool]:
        return {
            "BLOCK_C": self.block_c,
            "PATCHES_HIGH": self.patches_high,
            "PATCHES_LOW": self.patches_low,
            **super().constants(),
        }


def forward_launch(problem: Problem) -> TileLaunch:
    """The launch of the forward kernel on map tiles."""
    # exact products want the registers of twice the threads
    num_warps = 8 if problem.dtype == torch.float32 else 4
    return TileLaunch.of(problem, _block_c(problem, backward=False), num_warps)


@dataclass(frozen=True)
class BackwardPass(TileLaunch):
    """One launch of the backward kernel on map tiles: the gradients it gives, and how."""

    gives: tuple[str, ...]  # "x", "score" and "value": x, A with u, M with its constants
    ahead: bool = False  # fetches the next tile before a tile's products

    def is_needed(self, needs_x: bool, needs_weights: bool) -> bool:
        return (needs_x and "x" in self.gives) or (needs_weights and self.gives != ("x",))

    def pass_constants(self, needs_x: bool, needs_weights: bool) -> dict[str, int | bool]:
        return {
            "GIVE_X": needs_x and "x" in self.gives,
            "GIVE_SCORE": needs_weights and "score" in self.gives,
            "GIVE_VALUE": needs_weights and "value" in self.gives,
            "AHEAD": self.ahead,
            **self.constants(),
        }


def backward_passes(problem: Problem) -> tuple[BackwardPass, ...]:
    """The passes on map tiles that together give all gradients.

    One pass multiplies least, but holds both sums of the weights' gradients beside the products.
    """
    arch, exact = problem.architecture, problem.dtype == torch.float32
    block_c = _block_c(problem, backward=True)
    passes = (("x", "score", "value"),)
    num_warps = 4
    if problem.num_patches > 1:
        if arch == AMPERE:
            # two sums spill (32 to 120 bytes in half precision)
            passes = (("x",), ("score",), ("value",))
            num_warps = 8 if exact else 4
        elif exact and arch != CDNA:
            # one pass of TF32 spills (70 bytes on Hopper)
            passes = (("x",), ("score", "value"))
    # one group leaves registers for the next tile
    one_group = block_c * next_power_of_2(problem.num_patches) == TILE
    ahead = one_group and len(passes) == 1 and problem.num_patches > 1
    return tuple(
        BackwardPass.of(problem, block_c, num_warps, gives=gives, ahead=ahead) for gives in passes
    )


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
    # the next keys arrive while a block of them is multiplied; two stages would wait for their own
    return FlashLaunch(4, 3, 64, 64)


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
