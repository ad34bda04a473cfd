"""The CPSA kernels, cross-compiled: registers, spills, shared memory, instructions, no GPU needed.

`python tests/test_cpsa_resources.py --write` records every shipped configuration, as the installed
version of Triton compiles it, in tests/data/.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
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
)

pytest.importorskip("triton")

NAME = "cpsa_resources"

# number of patches -> height and width in patches, and the channels of CAT-S at that stage
SIZES = {
    1: (1, 1, 768),
    2: (1, 2, 384),
    4: (2, 2, 384),
    12: (3, 4, 192),
    16: (4, 4, 192),
    25: (5, 5, 384),
    49: (7, 7, 96),
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
    folds: bool = False  # with the kernel that folds the weights, the same for all sizes of maps
    joined: bool = False  # forward alone, with the norm and the residual
    two_stages: bool = False  # a planted fault: as no launch ships
    batch: int = 64

    def __str__(self) -> str:
        flags = ("autocast", "padded", "dropout", "least_dropout", "single", "pixel", "wide")
        flags += ("folds", "joined", "two_stages")
        words = [self.target, f"P{self.num_patches}", self.precision]
        words += [flag for flag in flags if getattr(self, flag)]
        return "-".join(words if self.batch == 64 else [*words, f"batch{self.batch}"])

    def compile(self) -> list[dict]:
        """What the kernels of the attention itself need; of another batch, all kernels."""
        from catkernels.kernels.cpsa.backward import cpsa_backward
        from catkernels.kernels.cpsa.forward import cpsa_forward, cpsa_residual
        from catkernels.kernels.cpsa.launch import FlashLaunch, Problem
        from catkernels.kernels.dense.norm import row_statistics
        from catkernels.kernels.launch import overriding

        def two_stages(table, problem, launch):
            return replace(launch, num_stages=2) if isinstance(launch, FlashLaunch) else launch

        def meta(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device="meta")

        dtype, torch.backends.cuda.matmul.fp32_precision = PRECISIONS[self.precision]
        rows, columns, channels = SIZES[self.num_patches]
        batch, channels = (1, 1) if self.single else (self.batch, channels)
        height, width = (7 * side - self.padded for side in (rows, columns))
        size = (batch, *((1, 1) if self.pixel else (height, width)), channels)
        x = meta(*size, dtype=torch.float32 if self.autocast else dtype)
        sizes = ((147, 49), (147,), (49, 49), (49,))
        weights = [meta(*sides, dtype=x.dtype) for sides in sizes]
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
            if self.two_stages:
                stack.enter_context(overriding(two_stages))
            compiled = stack.enter_context(compiling_for(self.target))
            out = meta(*size, dtype=dtype)
            if self.joined:
                statistics, norm = meta(*size[:3], 2), [meta(channels, dtype=x.dtype)] * 2
                factor, residual = meta(batch, dtype=dtype), torch.empty_like(x)
                row_statistics(x, statistics, 1e-5)
                arguments = (statistics, *norm, *weights, factor, residual, 7, 1 / 7, dtype)
                cpsa_residual(x, *arguments)
                has_backward = False
            else:
                cpsa_forward(x, *weights, seed, out, 7, 1 / 7, dropout_p)
            if has_backward:
                grads = (torch.empty_like(t) for t in (x, folded, bias))
                cpsa_backward(out, x, folded, seed, *grads, 7, dropout_p)
        helpers = ("cpsa_prepare_weights_kernel", "cpsa_sum_partials_kernel")
        if self.batch != 64:
            helpers = ()
        elif not self.folds:
            helpers += ("cpsa_fold_weights_kernel",)
        return [asdict(k.resources()) for k in compiled if k.kernel not in helpers]


def shipped() -> Iterator[Configuration]:
    """Every configuration that the recorded tables list."""
    for target in ("sm_90", "sm_80", "sm_100", "gfx942"):
        yield from (Configuration(target, num_patches) for num_patches in (1, 4, 16, 25, 64, 361))
        for num_patches in (16, 64):
            yield Configuration(target, num_patches, autocast=True, padded=True)
        yield Configuration(target, 4, dropout=True)
        yield Configuration(target, 1, single=True)
        yield Configuration(target, 361, single=True)
        yield Configuration(target, 16, "fp32")
        if target != "gfx942":
            yield Configuration(target, 4, "tf32")
        # weights in half precision, and in float32 under autocast
        for autocast in (False, True):
            yield Configuration(target, 1, autocast=autocast, folds=True)
    for num_patches in (2, 49):
        yield Configuration("sm_90", num_patches)
    for num_patches in (4, 64):
        yield Configuration("sm_90", num_patches, autocast=True)
    for num_patches in (16, 64):
        yield Configuration("sm_90", num_patches, dropout=True)
    for target in ("sm_86", "sm_89", "sm_120", "gfx90a"):
        yield Configuration(target, 4)
    for target in ("sm_90", "sm_80", "sm_100", "gfx942"):
        for num_patches in (1, 4, 16):
            for autocast in (False, True):
                yield Configuration(target, num_patches, autocast=autocast, joined=True)
        for num_patches in (12, 16):
            yield Configuration(target, num_patches, autocast=True, padded=True, joined=True)
        yield Configuration(target, 16, padded=True, joined=True)
        yield Configuration(target, 16, "fp16", joined=True)
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
    Configuration("sm_90", 16, joined=True),
    Configuration("sm_90", 12, autocast=True, padded=True, joined=True),
    *(Configuration("sm_90", 1, autocast=autocast, folds=True) for autocast in (False, True)),
]
# each a first call, if anything of a batch took part in what is compiled
BATCHES = [
    Configuration("sm_90", num_patches, batch=batch)
    for num_patches in (4, 361)
    for batch in (1, 2, 3, 16, 200, 256)
] + [Configuration("sm_90", 4, joined=True, batch=batch) for batch in (1, 16, 200)]
TWO_STAGES = Configuration("sm_90", 361, two_stages=True)
COMPILABLE = SHIPPED | {
    str(configuration): configuration for configuration in [*BATCHES, TWO_STAGES]
}


def check(configuration: Configuration, kernels: list[dict]) -> None:
    """The bars of every configuration, and those of half precision without extras."""
    target, num_patches = configuration.target, configuration.num_patches
    nvidia = target.startswith("sm_")
    half = configuration.precision in ("bf16", "fp16")
    dropout = configuration.dropout or configuration.least_dropout
    for kernel in kernels:
        message = f"{configuration}: {kernel}"
        name = kernel["kernel"]
        if name == "cpsa_flash_forward_kernel" and half and target == "sm_90":
            check_fetches_ahead(kernel)
        backward = "backward" in name
        assert kernel["shared_bytes"] <= min(TARGETS[target][-1], 99 * 1024), message
        # a kernel that compiled to a trap has a handful of instructions
        assert kernel["instructions"] >= 150, message
        if configuration.joined:
            check_joined(configuration, kernel)
            continue
        if name == "cpsa_fold_weights_kernel":
            # no product instruction, which might round factors, and code that is soon compiled
            assert kernel["matrix_products"] == kernel["stack_bytes"] == 0, message
            assert kernel["instructions"] <= 1400, message
            continue
        if name != "cpsa_copy_tokens_kernel":
            exact = nvidia and configuration.precision == "fp32"
            assert (kernel["matrix_products"] == 0) == exact, message
        if not half or dropout:
            assert kernel["stack_bytes"] <= 600, message
            continue

        if configuration.single or configuration.pixel:
            # one channel is no shape for tiles of 16: it has to compile, not to be fast
            assert kernel["stack_bytes"] <= 256, message
            continue
        assert kernel["stack_bytes"] <= stack_limit(configuration, name), message
        if not nvidia:
            continue

        # two programs share a multiprocessor: of 227 KB on Hopper and Blackwell, where groups wait
        # in shared memory, and of 99 KB elsewhere
        limit = 98 if target in ("sm_90", "sm_100") else 57 if backward else 49
        assert kernel["shared_bytes"] <= limit * 1024, message
        if not backward and target in ("sm_90", "sm_100"):
            limit = {1: 96, 2: 96, 4: 96, 16: 112}.get(num_patches, 255)
            assert kernel["registers"] <= limit, message
        access = kernel["global_access"]
        whole = access.get("load128", 0) + access.get("store128", 0)
        assert whole >= (4 if num_patches == 1 else 8), message
        assert not {"load16", "load8", "store16", "store8"} & set(access), message
        # tiles of fewer channels than 8, which more do not fit beside, move fewer bytes at a time
        narrow = num_patches > 16 or (num_patches == 16 and target != "sm_90" and backward)
        assert narrow or "map" not in name or "store64" not in access, message


def check_joined(configuration: Configuration, kernel: dict) -> None:
    """The bars of CPSA with its norm and residual, and of the norm's statistics."""
    message, target = f"{configuration}: {kernel}", configuration.target
    if kernel["kernel"] == "row_statistics_kernel":
        assert kernel["matrix_products"] == kernel["stack_bytes"] == 0, message
        # a tile in flight for each of many programs
        assert kernel["registers"] <= 64, message
        return
    # On Ampere two of 1300 instructions at 4 patches, and by Triton 3.6 a few where patches are
    # missing, pixels as well, and the map is float32.
    missing = configuration.autocast and configuration.padded and configuration.num_patches == 12
    limit = 32 if missing else 8 if configuration.num_patches == 4 else 0
    assert kernel["stack_bytes"] <= (limit if target == "sm_80" else 0), message
    assert kernel["matrix_products"] > 0, message
    if not target.startswith("sm_"):
        return
    assert kernel["shared_bytes"] <= 49 * 1024, message
    if target != "sm_80":
        # four programs share a multiprocessor, and three where a map in float32 is padded
        limit = 168 if configuration.autocast else 128
        assert kernel["registers"] <= limit, message
    access = kernel["global_access"]
    # the map by 16 bytes, twice, and the factor, a number
    assert access["load128"] >= 12, message
    assert access["store128"] >= 4, message
    assert not {"load8", "store16", "store8"} & set(access), message
    assert access["load16"] == 1, message


def check_fetches_ahead(forward: dict) -> None:
    """While keys are multiplied, copies of the next are under way: asked for, not waited for."""
    assert forward["copies_in_flight"] > 0, "forward waits for its copies"


def stack_limit(configuration: Configuration, kernel: str) -> int:
    """Bytes of stack that half precision may take without dropout."""
    target = configuration.target
    # patches that are not there and padding are masked, which takes registers
    masks = configuration.padded or 64 % configuration.num_patches != 0
    if target in ("sm_80", "sm_86", "sm_89", "sm_120"):
        # 48 for 25 patches by Triton 3.6; backward 40 on sm_120 by Triton 3.8
        return 48 if masks else 16 if "backward" not in kernel else 40
    if kernel != "cpsa_map_backward_kernel":
        return 0
    if target != "sm_90":
        # 36 on CDNA by Triton 3.6
        return 40 if masks and target == "gfx942" else 0
    # Four groups: 11 of 900 instructions a group. Masks and maps of float32 take more registers: of
    # float32 8 bytes at 4 patches by Triton 3.8.
    if configuration.num_patches <= 16:
        return 160 if configuration.padded else 8 * configuration.autocast
    if configuration.padded:
        return 448
    return 288 if configuration.num_patches < 64 or configuration.autocast else 144


@pytest.fixture(scope="module")
def sampled() -> dict[Configuration, list[dict]]:
    return compiled(__file__, COMPILABLE, [*SAMPLE, TWO_STAGES, *BATCHES])


@pytest.mark.parametrize("configuration", SAMPLE, ids=str)
def test_bars(configuration, sampled):
    check(configuration, sampled[configuration])


def test_two_stages_fetch_nothing_ahead(sampled):
    """A fault planted to be found: with it every block of keys waits for its own copies."""
    forward = next(k for k in sampled[TWO_STAGES] if k["kernel"] == "cpsa_flash_forward_kernel")
    with pytest.raises(AssertionError, match="forward waits"):
        check_fetches_ahead(forward)


def test_compiles_once_for_any_batch(sampled):
    kernels = [kernel for batch in BATCHES for kernel in sampled[batch]]
    compilations = {kernel["kernel"]: set() for kernel in kernels}
    for kernel in kernels:
        compilations[kernel["kernel"]].add(kernel["hash"])
    assert {name: len(hashes) for name, hashes in compilations.items()} == {
        "cpsa_fold_weights_kernel": 1,
        "cpsa_prepare_weights_kernel": 1,
        "cpsa_map_forward_kernel": 2,  # alone and joined
        "row_statistics_kernel": 1,
        "cpsa_map_backward_kernel": 1,
        "cpsa_copy_tokens_kernel": 2,  # to tokens and back
        "cpsa_flash_forward_kernel": 1,
        "cpsa_flash_query_backward_kernel": 1,
        "cpsa_flash_key_backward_kernel": 1,
        "cpsa_flash_weights_backward_kernel": 1,
        "cpsa_sum_partials_kernel": 2,  # of either way
    }


@pytest.mark.full
def test_bars_of_everything_shipped():
    """The recorded tables say what is compiled, to the last register, for their Triton version."""
    results = compiled(__file__, SHIPPED, SHIPPED.values())
    for configuration, kernels in results.items():
        check(configuration, kernels)
    compare_with_record(NAME, results)


if __name__ == "__main__":
    main(NAME, __file__, SHIPPED, COMPILABLE)
