"""``pytest --benchmark`` runs the benchmarks and nothing else; plain ``pytest`` leaves them out."""

from __future__ import annotations

import pytest

RATIOS = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmark", action="store_true", help="run the benchmarks instead of the tests"
    )


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return None if config.getoption("--benchmark") else True


@pytest.fixture
def report_ratio(request: pytest.FixtureRequest):
    """Show a line about this benchmark at the end of the run."""
    lines = request.config.stash.setdefault(RATIOS, [])
    return lines.append


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if lines := config.stash.get(RATIOS, []):
        terminalreporter.section("against the official order of operations")
        for line in lines:
            terminalreporter.line(line)
