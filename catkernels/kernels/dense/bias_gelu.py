"""GELU of a linear layer's output and bias, and its backward pass with the bias's gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from catkernels.kernels.dense.gelu import gelu, gelu_and_slope
from catkernels.kernels.dense.launch import COUNTS, GeluProblem, gelu_launch
from catkernels.kernels.launch import launched_as, on_device
from catkernels.kernels.tiles import chunk_bounds


@triton.jit(do_not_specialize=COUNTS)
def bias_gelu_kernel(
    h_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    UNITS: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """``gelu(h + bias)``.

    Grid: (tiles of ROWS rows * blocks of BLOCK_U units,), the block fastest.
    Writes: out (rows, UNITS).
    """
    BLOCKS: tl.constexpr = (UNITS + BLOCK_U - 1) // BLOCK_U
    unit, bias = _block(bias_ptr, tl.program_id(0) % BLOCKS, UNITS, BLOCK_U)
    place, mask = _tile(tl.program_id(0) // BLOCKS, unit, num_rows, UNITS, ROWS)
    # [ROWS, BLOCK_U]
    h = tl.load(h_ptr + place, mask=mask, other=0.0)
    tl.store(out_ptr + place, gelu(h.to(tl.float32) + bias, EXACT).to(h.dtype), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def bias_gelu_backward_kernel(
    grad_ptr,
    h_ptr,
    bias_ptr,
    dh_ptr,
    out_ptr,
    partials_ptr,
    num_rows,
    UNITS: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """``dh = grad gelu'(h + bias)``, and the sums of dh over rows.

    Grid: (chunks of tiles of ROWS rows * blocks of BLOCK_U units,), the block fastest.
    Writes: dh (rows, UNITS); out (rows, UNITS), gelu(h + bias) again, unless None; partials
    (chunks, UNITS) of the bias's gradient, unless None.
    """
    BLOCKS: tl.constexpr = (UNITS + BLOCK_U - 1) // BLOCK_U
    unit, bias = _block(bias_ptr, tl.program_id(0) % BLOCKS, UNITS, BLOCK_U)
    chunk = tl.program_id(0) // BLOCKS
    num_chunks = tl.num_programs(0) // BLOCKS
    first, last = chunk_bounds(chunk, num_chunks, tl.cdiv(num_rows, ROWS))
    # [ROWS, BLOCK_U]: rows are added at the end, once
    total = tl.zeros((ROWS, BLOCK_U), tl.float32)
    for tile in tl.range(first, last):
        place, mask = _tile(tile, unit, num_rows, UNITS, ROWS)
        h = tl.load(h_ptr + place, mask=mask, other=0.0)
        grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
        activated, slope = gelu_and_slope(h.to(tl.float32) + bias, EXACT)
        dh = grad * slope
        # rows beyond the last one have no gradient
        total += dh
        tl.store(dh_ptr + place, dh.to(h.dtype), mask=mask)
        if out_ptr is not None:
            tl.store(out_ptr + place, activated.to(h.dtype), mask=mask)
    if partials_ptr is not None:
        partials_ptr += chunk.to(tl.int64) * UNITS
        tl.store(partials_ptr + unit, tl.sum(total, 0), mask=unit < UNITS)


@triton.jit
def _block(bias_ptr, block, UNITS: tl.constexpr, BLOCK_U: tl.constexpr):
    """The units of a block, and their biases [1, BLOCK_U]."""
    unit = block * BLOCK_U + tl.arange(0, BLOCK_U)
    bias = tl.zeros([BLOCK_U], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + unit, mask=unit < UNITS, other=0.0).to(tl.float32)
    return unit, bias[None, :]


@triton.jit
def _tile(tile, unit, num_rows, UNITS: tl.constexpr, ROWS: tl.constexpr):
    """Places of a tile's values and which of them are there, [ROWS, BLOCK_U]."""
    row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = (row < num_rows)[:, None] & (unit < UNITS)[None, :]
    return row[:, None] * UNITS + unit[None, :], mask


def bias_gelu(h: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Launch `bias_gelu_kernel`. All tensors are contiguous, of float32, float16 or bfloat16.

    Args:
        h: (.., D).
        bias: (D,); no bias is zeros.
        out: written; like h.
    """
    with on_device(h.device):
        problem = GeluProblem.of(h)
        launch = launched_as(gelu_launch, problem)
        tiles = triton.cdiv(problem.num_rows, launch.rows)
        bias_gelu_kernel[(tiles * triton.cdiv(problem.units, launch.block_u),)](
            h, bias, out, **problem.arguments(), **launch.constants()
        )


def bias_gelu_backward(
    grad: Tensor,
    h: Tensor,
    bias: Tensor | None,
    dh: Tensor,
    out: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Launch `bias_gelu_backward_kernel`, and sum what its programs give for the bias.

    All tensors are contiguous, of float32, float16 or bfloat16.

    Args:
        grad: gradient of the output, like h.
        h, bias: as `bias_gelu` took them.
        dh: written; like h.
        out: written; like h, what `bias_gelu` gave. Or None.
        grad_bias: written; (D,) float32. Or None.
    """
    with on_device(h.device):
        problem = GeluProblem.of(h)
        launch = launched_as(gelu_launch, problem)
        blocks = triton.cdiv(problem.units, launch.block_u)
        chunks = min(triton.cdiv(problem.num_rows, launch.rows), launch.chunks)
        partials = None if grad_bias is None else grad_bias.new_empty((chunks, problem.units))
        bias_gelu_backward_kernel[(chunks * blocks,)](
            grad, h, bias, dh, out, partials, **problem.arguments(), **launch.constants()
        )
        if partials is not None:
            torch.sum(partials, 0, out=grad_bias)
