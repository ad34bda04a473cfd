"""The CPSA kernels, cross-compiled: registers, spills, shared memory, instructions, no GPU needed.

`python tests/test_cpsa_resources.py --write` records every shipped configuration, as the installed
version of Triton compiles it, in tests/data/.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from unittest import mock

import pytest
import torch
from cross_compile import (
    PRECISIONS,
    TARGETS,
    compare_with_record,
    compiled,
    compiling_for,
    main,
    triton_version,
)

pytest.importorskip("triton")

NAME = "cpsa_resources"

# number of patches -> height and width in patches, and the channels of CAT-S at that stage
SIZES = {
    1: (1, 1, 768),
    4: (2, 2, 384),
    16: (4, 4, 192),
    25: (5, 5, 384),
    64: (8, 8, 96),
    361: (19, 19, 96),
}


@dataclass(frozen=True)
class Configuration:
    """A forward and a backward pass of one stage of CAT-S."""

    target: str
    num_patches: int
    precision: str = "bf16"
    autocast: bool = False  # the map is float32
    padded: bool = False
    dropout: bool = False
    least_dropout: bool = False  # of the least probability, whose threshold is 1
    single: bool = False  # one channel of one image: every argument that can be 1 is
    pixel: bool = False  # maps of 1 x 1
    wide: bool = False  # offsets of 64 bits

    def __str__(self) -> str:
        flags = ("autocast", "padded", "dropout", "least_dropout", "single", "pixel", "wide")
        words = [self.target, f"P{self.num_patches}", self.precision]
        return "-".join(words + [flag for flag in flags if getattr(self, flag)])

    def compile(self) -> list[dict]:
        """What the kernels of the attention itself need."""
        from catkernels.kernels.cpsa.backward import cpsa_backward
        from catkernels.kernels.cpsa.forward import cpsa_forward
        from catkernels.kernels.cpsa.launch import Problem

        def meta(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device="meta")

        dtype, torch.backends.cuda.matmul.fp32_precision = PRECISIONS[self.precision]
        rows, columns, channels = SIZES[self.num_patches]
        batch, channels = (1, 1) if self.single else (64, channels)
        height, width = (7 * side - self.padded for side in (rows, columns))
        size = (batch, *((1, 1) if self.pixel else (height, width)), channels)
        x = meta(*size, dtype=torch.float32 if self.autocast else dtype)
        folded, bias = meta(2, 50, 49), meta(49)
        dropout_p = 2**-16 if self.least_dropout else 0.1 * self.dropout
        seed = meta(1, dtype=torch.int64) if dropout_p else None
        # NVIDIA's registers do not hold the backward pass of exact float32 products
        has_backward = (
            self.precision != "fp32" or self.num_patches == 1 or self.target.startswith("gfx")
        )
        with ExitStack() as stack:
            if self.wide:
                stack.enter_context(mock.patch.object(Problem, "wide", True))
            compiled = stack.enter_context(compiling_for(self.target))
            out = meta(*size, dtype=dtype)
            cpsa_forward(x, folded, bias, seed, out, 7, dropout_p)
            if has_backward:
                grads = (torch.empty_like(t) for t in (x, folded, bias))
                cpsa_backward(out, x, folded, seed, *grads, 7, dropout_p)
        helpers = ("cpsa_prepare_weights_kernel", "cpsa_sum_partials_kernel")
        return [asdict(k.resources()) for k in compiled if k.kernel not in helpers]


def shipped() -> Iterator[Configuration]:
    """Every configuration that the recorded tables list."""
    for target in ("sm_90", "sm_80", "sm_100", "gfx942"):
        yield from (Configuration(target, num_patches) for num_patches in SIZES)
        for num_patches in (16, 64):
            yield Configuration(target, num_patches, autocast=True, padded=True)
        yield Configuration(target, 4, dropout=True)
        yield Configuration(target, 1, single=True)
        yield Configuration(target, 361, single=True)
        yield Configuration(target, 16, "fp32")
        if target != "gfx942":
            yield Configuration(target, 4, "tf32")
    for target in ("sm_86", "sm_89", "sm_120", "gfx90a"):
        yield Configuration(target, 4)
    for target in ("sm_80", "sm_86", "sm_90"):
        yield from (Configuration(target, patches, "tf32") for patches in (1, 16, 64, 361))
    for target in ("sm_80", "sm_90"):
        yield Configuration(target, 16, "fp16")
        yield Configuration(target, 1, pixel=True)
        yield Configuration(target, 4, least_dropout=True)
        yield from (Configuration(target, patches, wide=True) for patches in (4, 361))


SHIPPED = {str(configuration): configuration for configuration in shipped()}
SAMPLE = [
    Configuration("sm_90", 4),
    Configuration("sm_90", 16),
    Configuration("sm_90", 64),
    Configuration("sm_90", 361),
    Configuration("sm_80", 4),
    Configuration("sm_100", 16),
    Configuration("gfx942", 1),
    Configuration("sm_90", 1, single=True),
]


def check(configuration: Configuration, kernels: list[dict]) -> None:
    """The bars of every configuration, and those of half precision without extras."""
    target, num_patches = configuration.target, configuration.num_patches
    nvidia = target.startswith("sm_")
    half = configuration.precision in ("bf16", "fp16")
    dropout = configuration.dropout or configuration.least_dropout
    # Triton 3.6 gives some backward kernels half of the registers on Ampere
    short = target == "sm_80" and triton_version() < (3, 8)
    for kernel in kernels:
        message = f"{configuration}: {kernel}"
        copies = kernel["kernel"] == "cpsa_copy_tokens_kernel"
        backward = "backward" in kernel["kernel"]
        assert kernel["shared_bytes"] <= min(TARGETS[target][-1], 99 * 1024), message
        # a kernel that compiled to a trap has a handful of instructions
        assert kernel["instructions"] >= 150, message
        if not copies:
            exact = nvidia and configuration.precision == "fp32"
            assert (kernel["matrix_products"] == 0) == exact, message
        if not half or dropout:
            tokens = kernel["kernel"] == "cpsa_tokens_backward_kernel"
            assert kernel["stack_bytes"] <= (2000 if short and tokens else 600), message
            continue

        if configuration.single or configuration.pixel:
            # one channel is no shape for tiles of 16: it has to compile, not to be fast
            assert kernel["stack_bytes"] <= 256, message
            continue
        if target in ("sm_80", "sm_86", "sm_89", "sm_120"):
            limit = 16 if not backward else 224 if short else 128
            assert kernel["stack_bytes"] <= limit, message
        elif target == "sm_90":
            assert kernel["stack_bytes"] <= (64 if backward else 0), message
        else:
            assert kernel["stack_bytes"] == 0, message
        if num_patches > 64:
            assert kernel["spills"] <= (4 if short else 0), message
        if not nvidia:
            continue

        assert kernel["shared_bytes"] <= (50 if backward else 34) * 1024, message
        if not backward and target in ("sm_90", "sm_100"):
            limit = {1: 128, 4: 128, 16: 168}.get(num_patches, 255)
            assert kernel["registers"] <= limit, message
        # all but constants and statistics moves 16 bytes at a time; backward passes that take 4
        # channels of 16 patches, one group, move 8
        access = kernel["global_access"]
        narrow = num_patches == 16 and kernel["kernel"] == "cpsa_map_backward_kernel"
        if not narrow:
            wide = access["load128"] + access["store128"]
            assert wide >= (4 if num_patches == 1 else 12), message
            assert not {"load16", "load8", "store64", "store16", "store8"} & set(access), message


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
