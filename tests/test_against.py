"""Two commits beside each other: which rows are compared, and what the comparison says."""

from __future__ import annotations

import pytest

from benchmarks import against


def row(contender_ms: float, official_ms: float, provider: str = "catkernels", void: bool = False):
    case = {"operation": "ipsa", "name": "stage1", "dtype": "float32", "direction": "step"}
    times = {"contender_ms": contender_ms, "official_ms": official_ms, "void": void}
    return case | times | {"provider": provider, "speedup": official_ms / contender_ms}


def test_a_row_is_faster_by_its_own_change_and_not_by_the_devices():
    before = {"ours": row(4.0, 8.0), "gone": row(1.0, 1.0)}
    # all takes half the time, and ours half of that again
    after = {"ours": row(1.0, 4.0), "new": row(1.0, 1.0)}
    *_, line = against.table(before, after)
    name = "ipsa stage1 float32 step catkernels"
    assert line == f"| {name} | 4 ms | 1 ms | 2.00x | 2.00x |"
    assert len(list(against.table(before, after))) == 3


def test_noisy_rows_are_void_and_the_official_ones_are_what_others_are_compared_with():
    before = {"ours": row(4.0, 8.0, void=True), "theirs": row(8.0, 8.0, "official")}
    after = {"ours": row(1.0, 8.0), "theirs": row(8.0, 8.0, "official")}
    *_, line = against.table(before, after)
    assert line.endswith("| void: too noisy | 1.00x |")
    assert len(list(against.table(before, after))) == 3


def test_an_unknown_commit(capfd):
    assert against.main(["no-such-commit"]) == 1
    assert "cannot check out 'no-such-commit'" in capfd.readouterr().err


@pytest.mark.full
def test_a_commit_against_itself(capfd, monkeypatch):
    # of a pytest-xdist worker, where pytest-benchmark times nothing
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    one = ["--trial", "benchmarks/bench_ipsa.py", "-k", "forward and catkernels"]
    assert against.main(["HEAD", *one]) == 0
    *_, line = capfd.readouterr().out.splitlines()
    assert line.startswith("| ipsa trial float32 forward catkernels |")
