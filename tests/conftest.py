"""Options and fixtures of every test."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

pytest_plugins = ["kernel_fixtures"]  # of the tests that run kernels

# Without a GPU the kernels run in Triton's interpreter, which must be on before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# One thread for this process and for those that tests start: the workers of pytest-xdist share the
# cores, and tensors this small gain nothing from a second one.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run everything, not a seeded sample")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: takes long; runs only with --full")
    # the same examples in every run, so that a failure is one that everybody sees
    common = {"derandomize": True, "deadline": None, "print_blob": True}
    hypothesis.settings.register_profile("sample", max_examples=20, **common)
    hypothesis.settings.register_profile("full", max_examples=500, **common)
    hypothesis.settings.load_profile("full" if config.getoption("--full") else "sample")


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """`pytest --benchmark` collects the benchmarks only."""
    return True if config.getoption("--benchmark", default=False) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        skip = pytest.mark.skip(reason="takes long: run `pytest --full`")
        for item in items:
            if "full" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether `--full` was given: tests then draw more samples."""
    return request.config.getoption("--full")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty` and its kin return with NaN, so that an unwritten cell shows."""

    def poison(function):
        def poisoned(*args, **kwargs):
            tensor = function(*args, **kwargs)
            if tensor.is_floating_point():
                # beside autograd, which lets nobody write into a leaf
                tensor.detach().fill_(float("nan"))
            return tensor

        return poisoned

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poison(getattr(torch.Tensor, name)))
