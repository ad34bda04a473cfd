"""``pytest --benchmark`` runs the benchmarks and nothing else; plain ``pytest`` leaves them out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._functorch.config

from benchmarks import harness
from benchmarks.clock import CLOCK, DEVICE
from catkernels import machine
from catkernels.torch_state.device import interpreting

RACES = pytest.StashKey[list[dict]]()
START_S = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmark", action="store_true", help="run the benchmarks instead of the tests"
    )
    parser.addoption(
        "--trial", action="store_true", help="one small shape: proves that all of it runs"
    )
    parser.addoption(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="fail the benchmarks that have not begun by then, so that the rest is stored",
    )
    parser.addoption(
        "--stored",
        action="append",
        default=[],
        type=Path,
        metavar="RUN.json",
        help="go on with a run: leave out the benchmarks that it has",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[START_S] = time.monotonic()
    if config.getoption("--benchmark") and config.getoption("numprocesses", None):
        raise pytest.UsageError("benchmarks are timed one after the other: leave out -n")
    if config.getoption("--benchmark") and DEVICE.type != "cpu" and interpreting():
        raise pytest.UsageError("TRITON_INTERPRET is set: unset it to time what the GPU does")


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return None if config.getoption("--benchmark") else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    runs = (json.loads(path.read_text()) for path in config.getoption("--stored"))
    known = {benchmark["fullname"] for run in runs for benchmark in run["benchmarks"]}
    items[:] = [item for item in items if item.nodeid not in known]
    for item in items:
        if "benchmark" in item.fixturenames and not item.get_closest_marker("benchmark"):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture(autouse=True)
def _within_the_time_limit(request: pytest.FixtureRequest) -> None:
    limit_s = request.config.getoption("--time-limit")
    if limit_s is not None and time.monotonic() - request.config.stash[START_S] > limit_s:
        pytest.fail(f"out of time: not begun within {limit_s:g} s", pytrace=False)


@pytest.fixture(autouse=True)
def _on_one_thread_and_stream() -> Iterator[None]:
    """One thread, to be comparable; on a GPU a stream that can be captured."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with harness.own_stream():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _backward_passes_can_repeat() -> Iterator[None]:
    """Keep what a compiled forward pass saved, though its backward pass would reuse the memory."""
    with torch._functorch.config.patch(donated_buffer=False):
        yield


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info.update(machine.describe(machine_info["cpu"].get("brand_raw", "unknown CPU")))
    machine_info["trial"] = config.getoption("--trial")


@pytest.fixture(autouse=True)
def _summed_up(request: pytest.FixtureRequest) -> None:
    """Keep what a benchmark writes down for the lines at the end of the run."""
    if "benchmark" in request.fixturenames:
        info = request.getfixturevalue("benchmark").extra_info
        request.config.stash.setdefault(RACES, []).append(info)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    races = [info for info in config.stash.get(RACES, []) if "speedup" in info]
    if not races:
        return
    terminalreporter.section("against the official operations, timed in turn")
    for race in races:
        verdict = "  void: too noisy" if race["void"] else ""
        terminalreporter.line(
            f"{race['speedup']:6.2f}x  (noise {race['official_against_itself']:4.2f}x)  "
            f"{race['operation']} {race['name']} {race['dtype']} {race['direction']} "
            f"{race['provider']}{verdict}"
        )
