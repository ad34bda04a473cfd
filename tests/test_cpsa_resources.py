"""The CPSA kernels, cross-compiled: registers, spills, shared memory, instructions, no GPU needed.

`python tests/test_cpsa_resources.py --write` records every shipped configuration, as the installed
version of Triton compiles it, in tests/data/.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from cross_compile import TARGETS, compiling_for, in_subprocess, table

PRECISIONS = {
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
    "fp32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
}
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
    single: bool = False  # one channel of one image: every argument that can be 1 is

    def __str__(self) -> str:
        flags = ("autocast", "padded", "dropout", "single")
        words = [self.target, f"P{self.num_patches}", self.precision]
        return "-".join(words + [flag for flag in flags if getattr(self, flag)])

    def compile(self) -> list[dict]:
        """What the kernels of the attention itself need."""
        from catkernels.kernels.cpsa_backward import cpsa_backward
        from catkernels.kernels.cpsa_forward import cpsa_forward

        def meta(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device="meta")

        dtype, torch.backends.cuda.matmul.fp32_precision = PRECISIONS[self.precision]
        rows, columns, channels = SIZES[self.num_patches]
        batch, channels = (1, 1) if self.single else (64, channels)
        size = (batch, 7 * rows - self.padded, 7 * columns - self.padded, channels)
        x = meta(*size, dtype=torch.float32 if self.autocast else dtype)
        folded, bias = meta(2, 50, 49), meta(49)
        seed = meta(1, dtype=torch.int64) if self.dropout else None
        dropout_p = 0.1 * self.dropout
        # NVIDIA's registers do not hold the backward pass of exact float32 products
        has_backward = (
            self.precision != "fp32" or self.num_patches == 1 or self.target.startswith("gfx")
        )
        with compiling_for(self.target) as compiled:
            cpsa_forward(x, folded, bias, seed, 7, dropout_p, dtype)
            if has_backward:
                cpsa_backward(meta(*size, dtype=dtype), x, folded, seed, 7, dropout_p, True, True)
        helpers = ("cpsa_prepare_weights_kernel", "cpsa_sum_partials_kernel")
        return [asdict(resources) for resources in compiled if resources.kernel not in helpers]


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


def compiled(configurations) -> dict[Configuration, list[dict]]:
    results = in_subprocess(__file__, *map(str, configurations))
    return {SHIPPED[name]: kernels for name, kernels in results.items()}


def check(configuration: Configuration, kernels: list[dict]) -> None:
    """The bars of every configuration, and those of half precision without dropout."""
    target, num_patches = configuration.target, configuration.num_patches
    nvidia = target.startswith("sm_")
    half = configuration.precision == "bf16"
    for kernel in kernels:
        message = f"{configuration}: {kernel}"
        copies = kernel["kernel"] == "cpsa_copy_tokens_kernel"
        backward = "backward" in kernel["kernel"]
        assert kernel["shared_bytes"] <= min(TARGETS[target][-1], 99 * 1024), message
        # a kernel that compiled to a trap has a handful of instructions
        assert kernel["instructions"] >= 200, message
        if not copies:
            exact = nvidia and configuration.precision == "fp32"
            assert (kernel["matrix_products"] == 0) == exact, message
        if not half or configuration.dropout:
            assert kernel["stack_bytes"] <= 600, message
            continue

        if configuration.single:
            # one channel is no shape for tiles of 16: it has to compile, not to be fast
            assert kernel["stack_bytes"] <= 256, message
            continue
        if target in ("sm_80", "sm_86", "sm_89", "sm_120"):
            assert kernel["stack_bytes"] <= (128 if backward else 16), message
        elif target == "sm_90":
            assert kernel["stack_bytes"] <= (64 if backward else 0), message
        else:
            assert kernel["stack_bytes"] == 0, message
        if num_patches > 64:
            assert kernel["spills"] == 0, message
        if not nvidia:
            continue

        assert kernel["shared_bytes"] <= (50 if backward else 34) * 1024, message
        if not backward and target in ("sm_90", "sm_100"):
            limit = {1: 128, 4: 128, 16: 168}.get(num_patches, 255)
            assert kernel["registers"] <= limit, message
        # all but constants and statistics moves 16 bytes at a time; a pass that gives Ampere's
        # gradient of the scores takes 4 channels, to hold one group
        access = kernel["global_access"]
        narrow = kernel["kernel"] == "cpsa_packed_backward_kernel" and target.startswith("sm_8")
        if not narrow:
            wide = access["load128"] + access["store128"]
            assert wide >= (4 if num_patches == 1 else 12), message
            assert not {"load16", "load8", "store64", "store16", "store8"} & set(access), message


def test_bars():
    for configuration, kernels in compiled(SAMPLE).items():
        check(configuration, kernels)


@pytest.mark.full
def test_bars_of_everything_shipped():
    """The recorded tables say what is compiled, to the last register, for their Triton version."""
    import triton

    results = compiled(SHIPPED.values())
    for configuration, kernels in results.items():
        check(configuration, kernels)
    recorded = table_path(triton.__version__)
    if recorded.exists():
        assert list(csv.reader(recorded.open())) == list(table(results))


def table_path(triton_version: str) -> Path:
    return Path(__file__).parent / "data" / f"cpsa_resources_triton_{triton_version}.csv"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        import triton

        rows = table(compiled(SHIPPED.values()))
        with table_path(triton.__version__).open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    else:
        json.dump({name: SHIPPED[name].compile() for name in sys.argv[1:]}, sys.stdout)
