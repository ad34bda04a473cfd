"""The kernels of a block's norms, MLP and linear layers, cross-compiled; no GPU needed.

`python tests/test_dense_resources.py --write` records every shipped configuration, as the installed
version of Triton compiles it, in tests/data/.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace

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
    two_stages: bool = False  # a planted fault: as no launch ships

    def __str__(self) -> str:
        name = f"{self.target}-{self.part}-C{self.channels}-{self.precision}"
        return f"{name}-two_stages" if self.two_stages else name

    @property
    def dtype(self) -> torch.dtype:
        return STREAMS[self.precision][0]

    @property
    def stream(self) -> torch.dtype:
        return torch.float32 if self.precision == "autocast" else self.dtype

    def compile(self) -> list[dict]:
        """What the part's kernels need."""
        from catkernels.kernels.launch import overriding

        torch.backends.cuda.matmul.fp32_precision = STREAMS[self.precision][1]
        with ExitStack() as stack:
            launched = stack.enter_context(compiling_for(self.target))
            if self.two_stages:
                stack.enter_context(overriding(lambda *asked: replace(asked[-1], num_stages=2)))
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


def compile_linear(case: Configuration) -> None:
    from catkernels.kernels.dense.linear import linear_residual, norm_linear

    x, attended, vector, channels = case.map(), case.map(product=True), case.vector(), case.channels
    qkv, proj = (meta(size, channels, dtype=case.dtype) for size in (3 * channels, channels))
    bias, out = case.vector(3 * channels), case.map(3 * channels, product=True)
    norm_linear(x, vector, vector, qkv, bias, out, 1e-5)
    linear_residual(x, attended, proj, vector, meta(64, dtype=case.dtype), x)


PARTS = {
    "norm": compile_norm,
    "mlp": compile_mlp,
    "gelu": compile_gelu,
    "linear": compile_linear,
}


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
                yield Configuration(target, "linear", channels, precision)
        yield Configuration(target, "mlp", 96, "fp16")
        yield Configuration(target, "linear", 96, "fp16")


# Of all families' launches on RDNA those that take most shared memory.
MOST_SHARED = [Configuration("gfx1100", part, 192, "fp16") for part in ("mlp", "linear")]
SHIPPED = {str(configuration): configuration for configuration in shipped()}
SAMPLE = [
    Configuration("sm_90", "norm", 384, "autocast"),
    Configuration("sm_90", "gelu", 384),
    Configuration("sm_90", "mlp", 96),
    Configuration("sm_80", "mlp", 64, "autocast"),
    Configuration("sm_90", "linear", 96),
    Configuration("sm_90", "linear", 192, "autocast"),
    Configuration("sm_80", "linear", 192),
]
TWO_STAGES = Configuration("sm_90", "linear", 192, two_stages=True)
COMPILABLE = SHIPPED | {str(c): c for c in (TWO_STAGES, *MOST_SHARED)}
# The kernels that multiply.
MULTIPLY = ("mlp", "linear")


def check(configuration: Configuration, kernels: list[dict]) -> None:
    """The bars of every configuration, and those of each part."""
    target = configuration.target
    # what is launched on sm_80 is launched on GPUs with less shared memory as well
    limit = 99 * 1024 if target == "sm_80" else TARGETS[target][-1]
    for kernel in kernels:
        assert kernel["shared_bytes"] <= limit, (configuration, kernel)
        assert kernel["stack_bytes"] == 0, (configuration, kernel)
        assert not kernel["hazards"], (configuration, kernel)
        if configuration.part in MULTIPLY:
            assert kernel["matrix_products"] > 0, (configuration, kernel)
            if target in ("sm_80", "sm_90"):
                check_fetches_ahead(configuration, kernel)
        elif target.startswith("sm_"):
            # four programs a processor
            assert kernel["registers"] <= 128, (configuration, kernel)


def check_fetches_ahead(configuration: Configuration, kernel: dict) -> None:
    """While some of a weight is multiplied, copies of what follows are under way."""
    # what keeps its weights fetches none, and up to 64 channels of a residual are one step
    fetches = "resident" not in kernel["kernel"]
    one_step = kernel["kernel"].startswith("linear_residual") and configuration.channels <= 64
    if fetches and not one_step:
        assert kernel["copies_in_flight"] > 0, (configuration, "waits for its copies", kernel)


def test_bars():
    """Of a sample; and a fault planted to be found: with two stages all wait for their copies."""
    results = compiled(__file__, COMPILABLE, [*SAMPLE, TWO_STAGES])
    for kernel in results.pop(TWO_STAGES):
        with pytest.raises(AssertionError, match="waits for its copies"):
            check_fetches_ahead(TWO_STAGES, kernel)
    for configuration, kernels in results.items():
        check(configuration, kernels)


def test_rdna_has_the_shared_memory_that_the_launches_of_ampere_take():
    """Where a launch takes more, Triton raises at a user's first call."""
    for kernels in compiled(__file__, COMPILABLE, MOST_SHARED).values():
        assert max(kernel["shared_bytes"] for kernel in kernels) <= TARGETS["gfx1100"][-1]


@pytest.mark.full
def test_bars_of_everything_shipped():
    """The recorded tables say what is compiled, to the last register, for their Triton version."""
    results = compiled(__file__, SHIPPED, SHIPPED.values())
    for configuration, kernels in results.items():
        check(configuration, kernels)
    compare_with_record(NAME, results)


if __name__ == "__main__":
    main(NAME, __file__, SHIPPED, COMPILABLE)
