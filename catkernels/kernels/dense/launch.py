"""Launches of the kernels of a block's norms, MLP and linear layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from catkernels.kernels.launch import (
    AMPERE,
    BLACKWELL,
    CDNA,
    HOPPER,
    Launch,
    Problem,
    dot_precision,
    next_power_of_2,
)

if TYPE_CHECKING:
    from typing_extensions import Self

# Arguments of the kernels that change from batch to batch and are not compiled for.
COUNTS = ("num_rows", "rows_per_image")


@dataclass(frozen=True)
class LimitedLaunch(Launch):
    """A launch that may say how many registers a thread has, on NVIDIA's GPUs alone."""

    max_registers: int | None = field(default=None, kw_only=True)  # None: what the kernel needs

    def constants(self) -> dict[str, int]:
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {**limit, **super().constants()}


def wide_piece(channels: int) -> int:
    """The first piece of a row: the largest power of two that is no more than its channels."""
    return 1 << channels.bit_length() - 1


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
        return next_power_of_2(self.channels)

    @property
    def wide(self) -> int:
        """The channels of the first piece, where rows are held as pieces (`rows`)."""
        return wide_piece(self.channels)

    def arguments(self, eps: float) -> dict[str, int | float]:
        """The arguments by value and the constants that both kernels take."""
        return {
            "num_rows": self.num_rows,
            "eps": eps,
            "C": self.channels,
            "BLOCK_C": self.block_c,
        }


@dataclass(frozen=True)
class NormLaunch(LimitedLaunch):
    """How a norm is launched: rows of a tile."""

    rows: int

    def constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, **super().constants()}


def norm_launch(problem: NormProblem) -> NormLaunch:
    """The launch of a norm, forward and backward."""
    # told of the limit, ptxas uses it; else it takes 96 and puts a value on the stack now and then
    limit = 128 if problem.architecture in (HOPPER, BLACKWELL) else None
    return NormLaunch(4, 1, rows=NORM_TILE // problem.block_c, max_registers=limit)


# Chunks of rows that GELU's backward pass sums fc1's bias gradient over, the same on every device
# for the bits of that sum. Times the blocks of units, of which a CAT has 2 to 24, they are at least
# one wave of programs on an H100.
GELU_CHUNKS = 264


@dataclass(frozen=True, kw_only=True)
class GeluProblem(Problem):
    """GELU of hidden units; products there are none."""

    num_rows: int
    units: int

    @classmethod
    def of(cls, h: Tensor) -> GeluProblem:
        """The problem of a tensor (.., D)."""
        return cls(
            dtype=h.dtype,
            device=h.device,
            precision="ieee",
            num_rows=h.shape[:-1].numel(),
            units=h.shape[-1],
        )

    def arguments(self) -> dict[str, int | bool]:
        """The arguments by value and the constants that both kernels take."""
        return {
            "num_rows": self.num_rows,
            "UNITS": self.units,
            "EXACT": self.dtype == torch.float32,
        }


@dataclass(frozen=True)
class GeluLaunch(Launch):
    """How GELU is launched."""

    rows: int  # of a tile
    block_u: int  # units of a tile
    chunks: int  # of rows, in the backward pass

    def constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, "BLOCK_U": self.block_u, **super().constants()}


def gelu_launch(problem: GeluProblem) -> GeluLaunch:
    """The launch of GELU, forward and backward."""
    # 16 values a thread, of which 8 adjoin in half precision
    return GeluLaunch(4, 1, rows=16, block_u=128, chunks=GELU_CHUNKS)


@dataclass(frozen=True, kw_only=True)
class RowsProblem(Problem):
    """Rows of a residual stream, held as pieces, beside products computed in ``dtype``."""

    num_rows: int
    rows_per_image: int
    channels: int
    stream: torch.dtype  # of the rows, which autocast leaves in float32

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, **others: int) -> Self:
        """The problem of rows (B, .., C), and of a weight in the products' dtype."""
        return cls(
            dtype=weight.dtype,
            device=x.device,
            precision=dot_precision(weight.dtype),
            num_rows=x.shape[:-1].numel(),
            rows_per_image=x.shape[1:-1].numel(),
            channels=x.shape[-1],
            stream=x.dtype,
            **others,
        )

    def constants(self) -> dict[str, int | str | bool]:
        """What all kernels of such rows are compiled for."""
        return {
            "C": self.channels,
            "WIDE": wide_piece(self.channels),
            "PRECISION": self.precision,
        }


@dataclass(frozen=True, kw_only=True)
class MlpProblem(RowsProblem):
    """The MLP of a block."""

    hidden: int

    def constants(self) -> dict[str, int | str | bool]:
        return {
            **super().constants(),
            "HIDDEN": self.hidden,
            "EXACT": self.dtype == torch.float32,
        }


@dataclass(frozen=True)
class MlpLaunch(LimitedLaunch):
    """How a kernel of the MLP is launched."""

    rows: int  # of a tile
    units: int  # hidden units of a step
    resident_programs: int = 0  # of the kernel that keeps the weights; 0: of the other one

    def constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, "UNITS": self.units, **super().constants()}


def mlp_forward_launch(problem: MlpProblem) -> MlpLaunch:
    """The launch of the MLP's forward pass."""
    arch, channels = problem.architecture, problem.channels
    half_stream = problem.stream == problem.dtype
    if problem.dtype == torch.float32:
        # for tests: exact products keep their operands in registers
        return MlpLaunch(8, 1, rows=32, units=16)
    if arch == CDNA:
        return MlpLaunch(8, 1, rows=128, units=32)
    if arch == HOPPER and problem.hidden == 4 * channels:
        # both weights fit in shared memory, and save fetching them once for each tile
        if channels == 64:
            # with 128 registers a processor holds two programs; a float32 stream would spill
            limit = 128 if half_stream else None
            return MlpLaunch(8, 1, rows=128, units=64, resident_programs=264, max_registers=limit)
        if channels == 96 and half_stream:
            # 16 warps, so that the products of some hide the GELU of others
            return MlpLaunch(16, 1, rows=256, units=32, resident_programs=132)
        if channels == 96:
            return MlpLaunch(8, 1, rows=128, units=64, resident_programs=132)
    # Three stages: with two, the wait for a step's weights follows their fetch at once.
    if arch in (HOPPER, BLACKWELL) and channels >= 64:
        # 128 rows fetch the weights half as often as 64, but spill 8 to 64 bytes at 192 channels,
        # on Hopper only where the stream is float32
        spills = channels == 192 and (arch == BLACKWELL or not half_stream)
        # where nothing is said, ptxas takes 128 registers in float16, and spills 16 bytes
        limit = 160 if arch == BLACKWELL and channels == 96 and half_stream else None
        return MlpLaunch(8, 3, rows=64 if spills else 128, units=64, max_registers=limit)
    # 64 rows of 192 channels spill (48 bytes)
    return MlpLaunch(4, 3, rows=64 if channels <= 128 else 32, units=32)


def mlp_backward_launch(problem: MlpProblem) -> MlpLaunch:
    """The launch of the MLP's backward pass."""
    arch, channels = problem.architecture, problem.channels
    if problem.dtype == torch.float32:
        return MlpLaunch(8, 1, rows=32, units=16)
    if arch == CDNA:
        return MlpLaunch(8, 1, rows=128, units=32)
    if arch == HOPPER and channels == 96:
        # with a float32 stream Triton 3.6 spills 24 bytes at 128 rows
        rows = 128 if problem.stream == problem.dtype else 64
        return MlpLaunch(8, 3, rows=rows, units=64)
    # 4 warps would take 254 registers for 96 channels
    return MlpLaunch(8 if channels == 96 else 4, 3, rows=64, units=32)


@dataclass(frozen=True, kw_only=True)
class LinearProblem(RowsProblem):
    """A linear layer from or to a block's rows."""

    features: int  # that it has on its other side

    def constants(self) -> dict[str, int | str | bool]:
        return {**super().constants(), "FEATURES": self.features}


@dataclass(frozen=True)
class LinearLaunch(Launch):
    """How a linear layer's kernel is launched."""

    rows: int  # of a tile
    step: int  # features at once

    def constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, "STEP": self.step, **super().constants()}


def norm_linear_launch(problem: LinearProblem) -> LinearLaunch:
    """The launch of a norm and a linear layer."""
    if problem.architecture == AMPERE and problem.channels == 192:
        # 128 rows need 112 KiB, and by Triton 3.6 spill 8 bytes
        return LinearLaunch(4, 3, rows=64, step=_step(problem))
    return _linear_launch(problem)


def linear_residual_launch(problem: LinearProblem) -> LinearLaunch:
    """The launch of a linear layer and a residual."""
    if problem.architecture == AMPERE:
        # twice as many features would take more than the 64 KiB of RDNA
        return LinearLaunch(8, 3, rows=128, step=32)
    return _linear_launch(problem)


def _linear_launch(problem: LinearProblem) -> LinearLaunch:
    """128 rows: half as many would fetch the weight for longer than the map takes."""
    stages = 1 if problem.architecture == CDNA else 3
    return LinearLaunch(8, stages, rows=128, step=_step(problem))


def _step(problem: LinearProblem) -> int:
    """Features at once: 64 where they divide, which are a line of the map in half precision."""
    return 64 if problem.features % 64 == 0 else 32
