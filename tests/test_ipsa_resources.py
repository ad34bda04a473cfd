"""The IPSA kernels, cross-compiled: registers, spills, shared memory, instructions, no GPU needed.

`python tests/test_ipsa_resources.py --write` records every shipped configuration, as the installed
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
    triton_version,
)

pytest.importorskip("triton")

NAME = "ipsa_resources"


@dataclass(frozen=True)
class Configuration:
    """A forward and a backward pass at the sizes of CAT-S, stage 1."""

    target: str
    patch_size: int = 7
    head_dim: int = 32
    precision: str = "bf16"
    padded: bool = False
    dropout: bool = False
    wide: bool = False  # offsets of 64 bits
    two_stages: bool = False  # a planted fault: as no launch ships
    sizes: tuple[int, int, int] = (64, 8, 3)  # batch, windows beside each other, heads

    def __str__(self) -> str:
        words = [self.target, f"N{self.patch_size}", f"D{self.head_dim}", self.precision]
        flags = ("padded", "dropout", "wide", "two_stages")
        words += [flag for flag in flags if getattr(self, flag)]
        if self.sizes != Configuration.sizes:
            words.append("x".join(map(str, self.sizes)))
        return "-".join(words)

    def compile(self) -> list[dict]:
        """What the forward kernel, the backward kernel and the table gradient's need."""
        from catkernels.kernels.ipsa.backward import ipsa_backward
        from catkernels.kernels.ipsa.forward import ipsa_forward
        from catkernels.kernels.ipsa.launch import Problem
        from catkernels.kernels.launch import overriding

        def meta(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device="meta")

        dtype, torch.backends.cuda.matmul.fp32_precision = PRECISIONS[self.precision]
        batch, windows, num_heads = self.sizes
        channels = num_heads * self.head_dim
        side = windows * self.patch_size - self.padded
        qkv = meta(batch, side, side, 3 * channels, dtype=dtype)
        out = meta(batch, side, side, channels, dtype=dtype)
        table = meta((2 * self.patch_size - 1) ** 2, num_heads)
        qkv_bias = meta(3 * channels) if self.padded else None
        seed = meta(1, dtype=torch.int64) if self.dropout else None
        lse = None
        if dtype != torch.float32:
            lse = meta(batch * windows**2, num_heads, self.patch_size**2)
        grad_pixels = meta(batch * windows**2 * self.patch_size**2, 3 * channels, dtype=dtype)
        problem = (num_heads, self.patch_size, self.head_dim**-0.5, 0.1 * self.dropout)
        with ExitStack() as stack:
            if self.wide:
                stack.enter_context(mock.patch.object(Problem, "wide", True))
            compiled = stack.enter_context(compiling_for(self.target))
            if self.two_stages:
                stack.enter_context(overriding(lambda *asked: replace(asked[-1], num_stages=2)))
            ipsa_forward(qkv, table, qkv_bias, seed, out, lse, *problem)
            ipsa_backward(out, qkv, table, qkv_bias, seed, lse, grad_pixels, table, *problem)
        return [asdict(kernel.resources()) for kernel in compiled]


def shipped() -> Iterator[Configuration]:
    """Every configuration that the recorded tables list."""
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        model = Configuration(target)
        for patch_size in (7, 8):
            for padded in (False, True):
                for dropout in (False, True):
                    yield replace(model, patch_size=patch_size, padded=padded, dropout=dropout)
        yield replace(model, wide=True)
        yield replace(model, precision="fp16")
        for patch_size in range(1, 7):
            yield replace(model, patch_size=patch_size, padded=patch_size > 1)
        for head_dim in (16, 24, 48, 64, 96, 128):
            yield replace(model, head_dim=head_dim)
        for head_dim in (16, 32, 48, 64, 96, 128):
            yield replace(model, head_dim=head_dim, precision="fp32")
        yield replace(model, precision="fp32", padded=True, dropout=True)
        if target != "gfx942":
            yield from (replace(model, precision="tf32", head_dim=d) for d in (32, 64, 128))
    for target in ("sm_86", "sm_89", "sm_120", "gfx90a"):
        yield Configuration(target)
        yield Configuration(target, precision="fp32", head_dim=128)


SHIPPED = {str(configuration): configuration for configuration in shipped()}
SAMPLE = [
    Configuration("sm_90"),
    Configuration("sm_90", padded=True),
    Configuration("sm_90", dropout=True),
    Configuration("sm_80"),
    Configuration("sm_100"),
    Configuration("gfx942"),
]
TWO_STAGES = Configuration("sm_90", two_stages=True)
BATCHES = [(batch, 2, 3) for batch in (1, 2, 3, 16, 200, 256)]
SIZES = [
    Configuration("sm_90", sizes=sizes)
    for sizes in [*BATCHES, (1, 1, 1), (16, 1, 3), (1, 16, 1), (1, 1, 16)]
]
COMPILABLE = SHIPPED | {str(c): c for c in [TWO_STAGES, *SIZES]}


def check(configuration: Configuration, kernels: list[dict]) -> None:
    """The bars of every configuration, and those of the models' own."""
    target, bits = configuration.target, 16 if "16" in configuration.precision else 32
    # Hopper's keep two programs resident; the default launches run where there are 99 KiB
    limit = 113 * 1024 if target == "sm_90" else min(TARGETS[target][-1], 99 * 1024)
    for kernel in kernels:
        assert kernel["shared_bytes"] <= limit, (configuration, kernel)
        assert kernel["stack_bytes"] <= 256, (configuration, kernel)
    for kernel in kernels[:2]:
        if target.startswith("sm_") and configuration.precision == "fp32":
            assert kernel["matrix_products"] == 0, "plain float32 became TF32"
        elif bits == 16:
            assert kernel["matrix_products"] > 0
    forward, backward, _ = kernels
    if bits == 16 and target.startswith("sm_") and configuration.head_dim >= 32:
        # the map moves 16 bytes at a time; the few narrow accesses are the log-sum-exp's and,
        # where the map is padded, the qkv bias's
        for kernel in kernels[:2]:
            access = kernel["loop_global_access"]
            narrow = sum(n for width, n in access.items() if not width.endswith("128"))
            assert narrow < access["load128"], (configuration, kernel)
            assert access["store128"] >= 1, (configuration, kernel)
    if bits == 16 and target.startswith("sm_") and target != "sm_100":
        check_fetches_ahead(configuration, forward, backward)
    if bits == 16 and configuration.head_dim == 32 and configuration.patch_size in (7, 8):
        both = configuration.padded and configuration.dropout
        # Triton 3.6 has 2 or 3 registers too few for dropout, and for 8 x 8 pixels on Blackwell
        tight = configuration.dropout or (target == "sm_100" and configuration.patch_size == 8)
        short = both or (tight and triton_version() < (3, 8))
        assert forward["spills"] == 0, configuration
        assert backward["spills"] == 0 or short, (configuration, backward)
        if target == "sm_90":
            special = configuration.padded or configuration.dropout
            assert forward["registers"] <= (255 if both else 168 if special else 128)
            # 5 and 3 resident programs, where registers allow 4 and 2
            assert forward["shared_bytes"] <= 44 * 1024
            assert backward["shared_bytes"] <= 58 * 1024


def check_fetches_ahead(configuration: Configuration, forward: dict, backward: dict) -> None:
    """While a tile is multiplied, copies of the next are under way: asked for, not waited for."""
    hopper, head_dim = configuration.target == "sm_90", configuration.head_dim
    if head_dim <= (64 if hopper else 32):
        assert forward["copies_in_flight"] > 0, (configuration, "forward waits for its copies")
    if hopper and head_dim <= 64 and not configuration.padded:
        assert backward["copies_in_flight"] > 0, (configuration, "backward waits for its copies")


@pytest.fixture(scope="module")
def sampled() -> dict[Configuration, list[dict]]:
    return compiled(__file__, COMPILABLE, [*SAMPLE, TWO_STAGES, *SIZES])


@pytest.mark.parametrize("configuration", SAMPLE, ids=str)
def test_bars(configuration, sampled):
    check(configuration, sampled[configuration])


def test_two_stages_fetch_nothing_ahead(sampled):
    """A fault planted to be found: with it every tile waits for its own copies."""
    forward, backward, _ = sampled[TWO_STAGES]
    with pytest.raises(AssertionError, match="forward waits"):
        check_fetches_ahead(TWO_STAGES, forward, backward)
    with pytest.raises(AssertionError, match="backward waits"):
        check_fetches_ahead(TWO_STAGES, {"copies_in_flight": 1}, backward)


def test_compiles_once_for_any_batch(sampled):
    """And for any map and number of heads, those whose every argument is 1 or 16 included."""
    kernels = [kernel for sizes in SIZES for kernel in sampled[sizes]]
    compilations = {kernel["kernel"]: set() for kernel in kernels}
    for kernel in kernels:
        compilations[kernel["kernel"]].add(kernel["hash"])
    assert {name: len(hashes) for name, hashes in compilations.items()} == {
        "ipsa_forward_kernel": 1,
        "ipsa_backward_kernel": 1,
        "ipsa_table_gradient_kernel": 1,
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
