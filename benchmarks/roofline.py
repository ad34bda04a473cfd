"""The physical limit of each operation: the least it must move and multiply, and how fast that is.

The models count what no implementation can avoid, not what one of them does: each input is read
once, each result written once, and nothing in between touches memory.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import torch

from benchmarks.clock import CLOCK, DEVICE
from catkernels.cases import Shape


@dataclass(frozen=True)
class Work:
    """What an operation cannot avoid: bytes to and from memory, and floating-point operations."""

    num_bytes: int
    flops: int

    def __add__(self, other: Work) -> Work:
        return Work(self.num_bytes + other.num_bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches at best, measured: a large copy, a large matrix product."""

    bytes_per_s: float
    flops_per_s: float

    def least_s(self, work: Work) -> float:
        """The seconds that ``work`` takes at the ceiling that binds it."""
        return max(work.num_bytes / self.bytes_per_s, work.flops / self.flops_per_s)

    def bound(self, work: Work) -> str:
        """The ceiling that binds ``work``: "memory" or "compute"."""
        memory_s, compute_s = work.num_bytes / self.bytes_per_s, work.flops / self.flops_per_s
        return "memory" if memory_s >= compute_s else "compute"


def ipsa_forward_work(shape: Shape, itemsize: int) -> Work:
    """Read q, k, v and the table, write the map; two products with the N*N x N*N weights."""
    moved = 4 * _map_size(shape) + _table_size(shape)
    return Work(moved * itemsize, 2 * _ipsa_product_flops(shape))


def ipsa_backward_work(shape: Shape, itemsize: int) -> Work:
    """Read q, k, v, the table and the map's gradient, write the gradients of the first four.

    Five products: the scores again, and one for each factor of the forward pass's two.
    """
    moved = 7 * _map_size(shape) + 2 * _table_size(shape)
    return Work(moved * itemsize, 5 * _ipsa_product_flops(shape))


def cpsa_forward_work(shape: Shape, itemsize: int) -> Work:
    """Read the map and the weights, write the map.

    With the weights of queries and keys folded into one matrix, and those of values and outputs
    into another, a token is multiplied with two matrices and with the other tokens twice. A single
    token attends to itself alone, and only the second matrix is left.
    """
    by_matrix, by_tokens = _cpsa_product_flops(shape)
    flops = by_matrix if shape.num_patches == 1 else 2 * by_matrix + 2 * by_tokens
    return Work((2 * _map_size(shape) + _weights_size(shape)) * itemsize, flops)


def cpsa_backward_work(shape: Shape, itemsize: int) -> Work:
    """Read the map, its gradient and the weights, write the gradients of map and weights.

    Two products for each of the forward pass's four, and all of those but the last again.
    """
    by_matrix, by_tokens = _cpsa_product_flops(shape)
    flops = 2 * by_matrix if shape.num_patches == 1 else 5 * by_matrix + 6 * by_tokens
    return Work((3 * _map_size(shape) + 2 * _weights_size(shape)) * itemsize, flops)


def norm_forward_work(shape: Shape, itemsize: int) -> Work:
    """Read the map and the norm's parameters, write the normed map."""
    return Work((2 * _map_size(shape) + _norm_size(shape)) * itemsize, 0)


def norm_backward_work(shape: Shape, itemsize: int) -> Work:
    """Read the map and the gradients that come through the norm and around it, write the map's."""
    return Work((4 * _map_size(shape) + 2 * _norm_size(shape)) * itemsize, 0)


def norm_qkv_forward_work(shape: Shape, itemsize: int) -> Work:
    """Read the map, write queries, keys and values."""
    moved = 4 * _map_size(shape) + _norm_size(shape) + _linear_size(shape, 3)
    return Work(moved * itemsize, _linear_flops(shape, 3))


def norm_qkv_backward_work(shape: Shape, itemsize: int) -> Work:
    """Read the map, the gradients of q, k and v and the one that goes around, write the map's."""
    moved = 6 * _map_size(shape) + 2 * (_norm_size(shape) + _linear_size(shape, 3))
    return Work(moved * itemsize, 2 * _linear_flops(shape, 3))


def proj_residual_forward_work(shape: Shape, itemsize: int) -> Work:
    """Read what was attended and the map, write their sum."""
    moved = 3 * _map_size(shape) + _linear_size(shape, 1)
    return Work(moved * itemsize, _linear_flops(shape, 1))


def proj_residual_backward_work(shape: Shape, itemsize: int) -> Work:
    """Read the gradient and what was attended, write the latter's; the map's is the one read."""
    moved = 3 * _map_size(shape) + 2 * _linear_size(shape, 1)
    return Work(moved * itemsize, 2 * _linear_flops(shape, 1))


def mlp_forward_work(shape: Shape, itemsize: int) -> Work:
    """Read the map and the parameters, write the map; two products with 4C hidden units."""
    moved = 2 * _map_size(shape) + _mlp_size(shape)
    return Work(moved * itemsize, 2 * _linear_flops(shape, 4))


def mlp_backward_work(shape: Shape, itemsize: int) -> Work:
    """Read the map, its gradient and the parameters, write the gradients of map and parameters.

    Two products for each of the forward pass's two, and the first of those again.
    """
    moved = 3 * _map_size(shape) + 2 * _mlp_size(shape)
    return Work(moved * itemsize, 5 * _linear_flops(shape, 4))


def ipsa_block_forward_work(shape: Shape, itemsize: int) -> Work:
    """Read the map and the parameters, write the map; what is between stays where it is."""
    moved = 2 * _map_size(shape) + _ipsa_block_size(shape)
    return Work(moved * itemsize, _ipsa_block_flops(shape))


def ipsa_block_backward_work(shape: Shape, itemsize: int) -> Work:
    """Read the map, its gradient and the parameters, write the gradients of map and parameters.

    Two products for each of the forward pass's, and all of those but the MLP's last again.
    """
    moved = 3 * _map_size(shape) + 2 * _ipsa_block_size(shape)
    return Work(moved * itemsize, 3 * _ipsa_block_flops(shape) - _linear_flops(shape, 4))


def cpsa_block_forward_work(shape: Shape, itemsize: int) -> Work:
    """As an IPSA block's, with CPSA's folded weights."""
    moved = 2 * _map_size(shape) + _cpsa_block_size(shape)
    return Work(moved * itemsize, _cpsa_block_flops(shape))


def cpsa_block_backward_work(shape: Shape, itemsize: int) -> Work:
    """As an IPSA block's."""
    moved = 3 * _map_size(shape) + 2 * _cpsa_block_size(shape)
    return Work(moved * itemsize, 3 * _cpsa_block_flops(shape) - _linear_flops(shape, 4))


def _map_size(shape: Shape) -> int:
    """Values of the map (B, H, W, C); pixels that pad it are in no memory."""
    return shape.batch * shape.height * shape.width * shape.channels


def _table_size(shape: Shape) -> int:
    return (2 * shape.patch_size - 1) ** 2 * shape.num_heads


def _weights_size(shape: Shape) -> int:
    """Values of CPSA's two linear layers."""
    pixels = shape.patch_size**2
    return 4 * pixels**2 + 4 * pixels


def _norm_size(shape: Shape) -> int:
    return 2 * shape.channels


def _linear_size(shape: Shape, times: int) -> int:
    """Values of a linear layer from C to so many times C, with its bias."""
    return times * shape.channels * (shape.channels + 1)


def _mlp_size(shape: Shape) -> int:
    """Values of an MLP with its norm."""
    return _norm_size(shape) + _linear_size(shape, 4) + shape.channels * (4 * shape.channels + 1)


def _ipsa_block_size(shape: Shape) -> int:
    attention = _linear_size(shape, 3) + _table_size(shape) + _linear_size(shape, 1)
    return _norm_size(shape) + attention + _mlp_size(shape)


def _cpsa_block_size(shape: Shape) -> int:
    return _norm_size(shape) + _weights_size(shape) + _mlp_size(shape)


def _linear_flops(shape: Shape, times: int) -> int:
    """One product of all pixels with a weight of C x so many times C."""
    return 2 * times * _map_size(shape) * shape.channels


def _ipsa_block_flops(shape: Shape) -> int:
    linears = _linear_flops(shape, 3) + _linear_flops(shape, 1) + 2 * _linear_flops(shape, 4)
    return linears + 2 * _ipsa_product_flops(shape)


def _cpsa_block_flops(shape: Shape) -> int:
    return cpsa_forward_work(shape, 0).flops + 2 * _linear_flops(shape, 4)


def _ipsa_product_flops(shape: Shape) -> int:
    """One product of N*N x N*N with N*N x head_dim in all heads of all windows, padded ones too."""
    windows = shape.batch * shape.num_patches
    return 2 * windows * shape.patch_size**4 * shape.channels


def _cpsa_product_flops(shape: Shape) -> tuple[int, int]:
    """A product of all patches with an N*N x N*N matrix, and one with all other patches."""
    tokens = shape.batch * shape.channels * shape.num_patches
    pixels = shape.patch_size**2
    return 2 * tokens * pixels**2, 2 * tokens * shape.num_patches * pixels


@functools.cache
def ceilings(dtype: torch.dtype) -> Ceilings:
    """Measure both ceilings on this device, on the threads that PyTorch may use at present."""
    on_cpu = DEVICE.type == "cpu"
    source = torch.ones(2**26 if on_cpu else 2**28, dtype=torch.float32, device=DEVICE)
    target = torch.empty_like(source)
    copy_s = _fastest_s(lambda: target.copy_(source))
    side = 1024 if on_cpu else 8192
    left, right = torch.randn(2, side, side, device=DEVICE).to(dtype).unbind()
    product = torch.empty_like(left)
    matmul_s = _fastest_s(lambda: torch.mm(left, right, out=product))
    return Ceilings(2 * source.nbytes / copy_s, 2 * side**3 / matmul_s)


def _fastest_s(run, seconds: float = 0.5) -> float:
    """The fastest of as many calls as fit into some time, and of three at least."""
    times, end = [], time.perf_counter() + seconds
    run()
    while len(times) < 3 or time.perf_counter() < end:
        start = CLOCK()
        run()
        times.append(CLOCK() - start)
    return min(times)
