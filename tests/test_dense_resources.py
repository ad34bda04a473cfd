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

pytest.importorskip("triton")

NAME = "dense_resources"
# The dtypes of x and of the products; "autocast" has a residual stream in float32.
STREAMS = {**PRECISIONS, "autocast": (torch.bfloat16, "ieee")}


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


def compile_mlp(case: Configuration) -> None:
    from catkernels.kernels.dense.mlp_backward import mlp_backward
    from catkernels.kernels.dense.mlp_forward import mlp_forward
    from catkernels.ops.mlp import BACKWARD_CHANNELS, ONES

    channels, hidden = case.channels, 4 * case.channels
    x, vector, count = case.map(), case.vector(), 64 * 56 * 56
    fc1, fc2 = (meta(*size, dtype=case.dtype) for size in ((hidden, channels), (channels, hidden)))
    parameters = (vector, vector, fc1, case.vector(hidden), fc2)
    factor = meta(64, dtype=case.dtype)
    mlp_forward(x, *parameters, vector, factor, x, 1e-5)
    if channels in BACKWARD_CHANNELS:
        widths = (channels + ONES, channels, hidden, hidden)
        written = [meta(count, width, dtype=case.dtype) for width in widths]
        mlp_backward(x, x, *parameters, factor, x, meta(2, channels), *written, 1e-5)


def compile_gelu(case: Configuration) -> None:
    from catkernels.kernels.dense.bias_gelu import bias_gelu, bias_gelu_backward

    h, bias = case.map(4 * case.channels, product=True), case.vector(4 * case.channels)
    bias_gelu(h, bias, h)
    bias_gelu_backward(h, h, bias, h, None, meta(4 * case.channels))
    bias_gelu_backward(h, h, bias, h, h, meta(4 * case.channels))


PARTS = {"norm": compile_norm, "mlp": compile_mlp, "gelu": compile_gelu}


def shipped() -> Iterator[Configuration]:
    """Every configuration that the recorded tables list."""
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        for channels in (96, 192, 384, 768):
            for precision in ("bf16", "autocast", "fp32"):
                yield Configuration(target, "norm", channels, precision)
        for channels in (64, 1024):
            yield Configuration(target, "norm", channels, "fp16")
        for precision in ("bf16", "autocast", "fp32"):
            yield Configuration(target, "gelu", 384, precision)
        for channels in (32, 64, 96, 128, 192):
            for precision in ("bf16", "autocast"):
                yield Configuration(target, "mlp", channels, precision)
        yield Configuration(target, "mlp", 96, "fp16")


# Of all families' launches on RDNA the one that takes most shared memory.
MOST_SHARED = Configuration("gfx1100", "mlp", 192, "fp16")
SHIPPED = {str(configuration): configuration for configuration in shipped()}
SAMPLE = [
    Configuration("sm_90", "norm", 384, "autocast"),
    Configuration("sm_90", "gelu", 384),
    Configuration("sm_90", "mlp", 96),
    Configuration("sm_80", "mlp", 64, "autocast"),
]


def check(configuration: Configuration, kernels: list[dict]) -> None:
    """The bars of every configuration, and those of each part."""
    target = configuration.target
    # what is launched on sm_80 is launched on GPUs with less shared memory as well
    limit = 99 * 1024 if target == "sm_80" else TARGETS[target][-1]
    # on Blackwell ptxas puts a value or two on the stack though it has registers left
    stack_bytes = 8 if target == "sm_100" and configuration.part != "mlp" else 0
    for kernel in kernels:
        assert kernel["shared_bytes"] <= limit, (configuration, kernel)
        assert kernel["stack_bytes"] <= stack_bytes, (configuration, kernel)
        assert not kernel["hazards"], (configuration, kernel)
        if configuration.part == "mlp":
            assert kernel["matrix_products"] > 0, (configuration, kernel)
        elif target.startswith("sm_"):
            # four programs a processor
            assert kernel["registers"] <= 128, (configuration, kernel)


def test_bars():
    for configuration, kernels in compiled(__file__, SHIPPED, SAMPLE).items():
        check(configuration, kernels)


def test_rdna_has_the_shared_memory_that_the_launches_of_ampere_take():
    """Where a launch takes more, Triton raises at a user's first call."""
    (kernels,) = compiled(__file__, {str(MOST_SHARED): MOST_SHARED}, [MOST_SHARED]).values()
    assert max(kernel["shared_bytes"] for kernel in kernels) <= TARGETS["gfx1100"][-1]


@pytest.mark.full
def test_bars_of_everything_shipped():
    """The recorded tables say what is compiled, to the last register, for their Triton version."""
    results = compiled(__file__, SHIPPED, SHIPPED.values())
    for configuration, kernels in results.items():
        check(configuration, kernels)
    compare_with_record(NAME, results)


if __name__ == "__main__":
    main(NAME, __file__, SHIPPED, SHIPPED | {str(MOST_SHARED): MOST_SHARED})
