"""Fixtures for tests that run kernels: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """Where kernels run here: the GPU, else the CPU through Triton's interpreter."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each kernel, by name, was launched; a test must launch at least one."""
    from catkernels.kernels.tiles import dot as any_jit_function

    counter: Counter[str] = Counter()
    kernel_class = type(any_jit_function)
    run = kernel_class.run

    def counted(kernel, *args, **kwargs):
        counter[kernel.__name__] += 1
        return run(kernel, *args, **kwargs)

    monkeypatch.setattr(kernel_class, "run", counted)
    yield counter
    assert counter, "no kernel ran"


@pytest.fixture
def tf32_on_gpus() -> Iterator[None]:
    """Let float32 products be TF32 on a GPU, which has no backward pass of CPSA for exact ones."""
    from catkernels.ops import cpsa

    before = torch.get_float32_matmul_precision()
    if not cpsa.interpreting():
        torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def round_to_nearest_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter round float32 to bfloat16 as GPUs do; by itself it truncates."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(values, source, target, rounding_mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding_mode)
        bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", rounding)


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


def kept(
    seed: int, dropout_p: float, rows: int, columns: int, heads: int, sequences: int
) -> torch.Tensor:
    """The weights that the kernels' dropout keeps: bool (sequences, heads, rows, columns)."""
    groups = -(-columns // 8)
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
