"""The kernels of a block's norms, MLP and linear layers, cross-compiled; no GPU needed.

`python tests/test_dense_resources.py --write` records every shipped configuration, as the installed
version of Triton compiles it, in tests/data/.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import pytest
import torch
from cross_compile import (
    PRECISIONS,
    TARGETS,
    compare_with_record,
    compiled,
    compiling_for,
    main,
)

NAME = "dense_resources"
# The dtypes of x and of the products; "autocast" has a residual stream in float32.
STREAMS = {**PRECISIONS, "autocast": (torch.bfloat16, "ieee")}
MAIN_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def meta(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Configuration:
    """The kernels of one part of a block, at the sizes of batch 64 of a map 56 x 56."""

    target: str
    part: str
    channels: int
    precision: str = "bf16"

    def __str__(self) -> str:
        return f"{self.target}-{self.part}-C{self.channels}-{self.precision}"

    @property
    def dtype(self) -> torch.dtype:
        return STREAMS[self.precision][0]

    @property
    def stream(self) -> torch.dtype:
        return torch.float32 if self.precision == "autocast" else self.dtype

    def compile(self) -> list[dict]:
        """What the part's kernels need."""
        torch.backends.cuda.matmul.fp32_precision = STREAMS[self.precision][1]
        with compiling_for(self.target) as launched:
            PARTS[self.part](self)
        return [asdict(kernel.resources()) for kernel in launched]

    def map(self, channels: int = 0, *, product: bool = False) -> torch.Tensor:
        """A map of the residual stream, or of what products give."""
        dtype = self.dtype if product else self.stream
        return meta(64, 56, 56, channels or self.channels, dtype=dtype)

    def vector(self, size: int = 0) -> torch.Tensor:
        """A norm's parameter, or another in the dtype of the stream."""
        return meta(size or self.channels, dtype=self.stream)


def compile_norm(case: Configuration) -> None:
    from catkernels.kernels.dense.norm import norm_backward, norm_forward

    x, weight, normed = case.map(), case.vector(), case.map(product=True)
    norm_forward(x, weight, weight, normed, 1e-5)
    sums = meta(2, case.channels)
    norm_backward(x, normed, x, weight, weight, x, sums, None, 1e-5)
    norm_backward(x, normed, x, weight, weight, x, sums, normed, 1e-5)


PARTS = {"norm": compile_norm}


def shipped() -> Iterator[Configuration]:
    """Every configuration that the recorded tables list."""
    for target in MAIN_TARGETS:
        for channels in (96, 192, 384, 768):
            for precision in ("bf16", "autocast", "fp32"):
                yield Configuration(target, "norm", channels, precision)
        for channels in (64, 1024):
            yield Configuration(target, "norm", channels, "fp16")


SHIPPED = {str(configuration): configuration for configuration in shipped()}
SAMPLE = [
    Configuration("sm_90", "norm", 96),
    Configuration("sm_90", "norm", 384, "autocast"),
    Configuration("gfx942", "norm", 768),
]


def check(configuration: Configuration, kernels: list[dict]) -> None:
    """The bars of every configuration, and those of each part."""
    limit = min(TARGETS[configuration.target][-1], 99 * 1024)
    # on Blackwell ptxas puts a value or two on the stack though it has registers left
    stack_bytes = 8 if configuration.target == "sm_100" else 0
    for kernel in kernels:
        assert kernel["shared_bytes"] <= limit, (configuration, kernel)
        assert kernel["stack_bytes"] <= stack_bytes, (configuration, kernel)
    if configuration.part == "norm":
        for kernel in kernels:
            # four programs a processor
            assert kernel["registers"] <= 128, (configuration, kernel)


def test_bars():
    for configuration, kernels in compiled(__file__, SHIPPED, SAMPLE).items():
        check(configuration, kernels)


@pytest.mark.full
def test_bars_of_everything_shipped():
    """The recorded tables say what is compiled, to the last register, for their Triton version."""
    results = compiled(__file__, SHIPPED, SHIPPED.values())
    for configuration, kernels in results.items():
        check(configuration, kernels)
    compare_with_record(NAME, results)


if __name__ == "__main__":
    main(NAME, __file__, SHIPPED)
