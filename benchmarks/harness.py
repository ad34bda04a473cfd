"""How everything is timed: judged first, then round by round in turn with the official operations.

A machine's speed drifts, so a contender is only compared with official operations of the same
rounds, and those with themselves: where the two timings of the same operations differ by more than
a tenth, the comparison is void. On a GPU each launch finds the L2 cache flushed, device events take
the time, and launches are replayed from a CUDA graph so that the host keeps up.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import statistics
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks.clock import CLOCK, DEVICE
from benchmarks.roofline import Ceilings, Work
from catkernels.accuracy import OutOfBudget, assert_within_error_budget

WARM_UPS = 3
# At most this much may the official operations, timed twice, differ from themselves.
NOISE = 0.1

# Noise only ever adds to a time on a CPU, whose fastest round is the least disturbed; the clocks of
# a GPU move both ways.
typical = min if DEVICE.type == "cpu" else statistics.median


def judge(
    contender: dict[str, Tensor], official: dict[str, Tensor], float64: dict[str, Tensor]
) -> None:
    """Check that a contender's results, by name, keep the error budget: else it gets no number.

    Args:
        contender: what is to be timed computed this.
        official: the same by the official operations in the same dtype.
        float64: the same by the official operations in float64.

    Raises:
        OutOfBudget: a result is over it, or is missing.
    """
    if contender.keys() != float64.keys():
        raise OutOfBudget(
            f"the contender gives {', '.join(contender)}; needed: {', '.join(float64)}"
        )
    for name, truth in float64.items():
        assert_within_error_budget(contender[name], official[name], truth, name)


@contextlib.contextmanager
def admitting(provider: str) -> Iterator[None]:
    """Skip a peer that cannot run here or is judged wrong, with the reason; what is ours fails."""
    try:
        yield
    except (OutOfBudget, NotImplementedError, RuntimeError) as error:
        if provider in ("official", "catkernels", "patched"):
            raise
        pytest.skip(f"{provider} gets no number: {error}")


class Stopwatch:
    """As much of pytest-benchmark's fixture as `race` needs, for a program without pytest."""

    enabled = True

    def __init__(self, clock: Callable = CLOCK) -> None:
        self.clock = clock
        self.group: str | None = None
        self.extra_info: dict = {}

    def pedantic(self, target: Callable, *, setup: Callable, rounds: int) -> None:
        seconds = []
        for _ in range(rounds):
            setup()
            start = self.clock()
            target()
            seconds.append(self.clock() - start)
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=seconds))


def race(
    benchmark,
    contender: Callable[[], object],
    official: Callable[[], object],
    *,
    work: Work,
    ceilings: Ceilings,
    rounds: int,
    clock: Callable = CLOCK,
    capture: bool = True,
) -> None:
    """Time a contender in turn with the official operations, and write down what came of it.

    Args:
        benchmark: the fixture of pytest-benchmark, whose timer must be ``clock``. Its
            ``extra_info`` gets the official times, the speed-up over them and their noise, GB/s,
            TFLOP/s and the share of the roofline. Where it is disabled, the contender runs once.
        contender, official: callables of no argument, compiled already.
        work: the least that the operation must do.
        ceilings: this device's, for the dtype.
        rounds: timings of each.
        clock: what time is taken with, see `benchmarks.clock`.
        capture: replay both from CUDA graphs where that is possible.
    """
    if not benchmark.enabled:
        benchmark.pedantic(contender)
        return
    benchmark.extra_info.update(peak_mib=peak_mib(contender), official_peak_mib=peak_mib(official))
    if capture:
        contender, launched = captured(contender)
        official, official_launched = captured(official)
        benchmark.extra_info.update(launched=launched, official_launched=official_launched)
    for run in (official, contender) * WARM_UPS:
        run()
    first_s: list[float] = []
    second_s: list[float] = []

    def settle() -> None:
        flush_cache()
        if clock is not CLOCK:
            # what the host's clock times must not find the device busy
            torch.get_device_module(DEVICE).synchronize()

    def time_the_official_operations() -> None:
        for times in (first_s, second_s):
            settle()
            start = clock()
            official()
            times.append(clock() - start)
        settle()

    benchmark.pedantic(contender, setup=time_the_official_operations, rounds=rounds)
    seconds, official_s = typical(benchmark.stats.stats.data), typical(first_s)
    noise = official_s / typical(second_s)
    benchmark.extra_info.update(
        contender_ms=seconds * 1e3,
        official_ms=official_s * 1e3,
        official_quartiles_ms=[s * 1e3 for s in statistics.quantiles(first_s, n=4)],
        speedup=official_s / seconds,
        official_against_itself=noise,
        void=abs(noise - 1) > NOISE,
        num_bytes=work.num_bytes,
        flops=work.flops,
        gb_per_s=work.num_bytes / seconds / 1e9,
        tflop_per_s=work.flops / seconds / 1e12,
        percent_of_roofline=100 * ceilings.least_s(work) / seconds,
        official_percent_of_roofline=100 * ceilings.least_s(work) / official_s,
        bound_by=ceilings.bound(work),
    )


def compiled(run: Callable) -> Callable:
    """A function or model through `torch.compile`, as if nothing had been compiled before."""
    torch.compiler.reset()
    return torch.compile(run, dynamic=False)


def flush_cache() -> None:
    """Queue a write of more memory than the L2 cache of any GPU holds; a CPU's stays as it is."""
    if DEVICE.type != "cpu":
        torch.empty(2**28, dtype=torch.int8, device=DEVICE).zero_()


def own_stream() -> contextlib.AbstractContextManager:
    """A context whose work goes to another stream: the default one cannot be captured."""
    if DEVICE.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(_stream())


@functools.cache
def _stream() -> torch.cuda.Stream:
    """One for all, since results of one benchmark are kept for the next."""
    return torch.cuda.Stream()


def captured(run: Callable[[], object]) -> tuple[Callable[[], object], str]:
    """``run`` as it is to be timed, and how that launches: "graph", or "stream" and why.

    On a GPU it becomes a CUDA graph: eager launches can take the host longer than the device, and
    then their number is timed and not their work. Where the capture fails, ``run`` itself is timed.
    """
    if DEVICE.type != "cuda":
        return run, "stream"
    for _ in range(WARM_UPS):
        run()
    graph = torch.cuda.CUDAGraph()
    try:
        # autograd runs a backward pass on the forward pass's stream, which must be the captured one
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            run()
    except RuntimeError as error:
        return run, f"stream: {error}"
    return graph.replay, "graph"


def peak_mib(run: Callable[[], object]) -> float | None:
    """MiB that one call needs at its peak beside what is allocated already; None on a CPU."""
    if DEVICE.type == "cpu":
        return None
    memory = torch.get_device_module(DEVICE)
    gc.collect()
    memory.reset_peak_memory_stats()
    before = memory.memory_allocated()
    run()
    memory.synchronize()
    return (memory.max_memory_allocated() - before) / 2**20
