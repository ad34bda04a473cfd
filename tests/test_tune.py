"""Tuning: which launches are candidates, and that only right ones are timed."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest

from benchmarks import tune
from benchmarks.bench_cpsa import CPSA
from benchmarks.bench_ipsa import IPSA
from benchmarks.candidates import Candidate, candidates, looked_up
from catkernels.ops import cpsa

FEW, MANY = tune.TRIAL_SHAPES
PROBLEM = tune.Problem(IPSA, "forward", FEW, "tf32")


@pytest.fixture
def tuning(monkeypatch, tmp_path):
    """Tune one problem; returns the exit status and the file's rows."""
    pytest.importorskip("triton")
    monkeypatch.setattr(tune, "problems", lambda trial: [PROBLEM])
    path = tmp_path / "tune.json"

    def run() -> tuple[int, list[dict]]:
        monkeypatch.setattr(sys, "argv", ["tune", str(path), "--trial"])
        return tune.main(), json.loads(path.read_text())["launches"]

    return run


def test_tuning_writes_each_row_and_goes_on_where_it_was(tuning, monkeypatch):
    status, (row,) = tuning()
    assert status == 0
    assert row["table"] == "ipsa.launch.forward_launch"
    assert row["shipped_ms"] == row["candidates_ms"]["shipped"] > 0
    assert len(row["candidates_ms"]) == 2
    another = dataclasses.replace(PROBLEM, shape=MANY)
    monkeypatch.setattr(tune, "problems", lambda trial: [PROBLEM, another])
    status, (same, _) = tuning()
    assert status == 0
    assert same == row

    def break_the_device(*_):
        raise RuntimeError("illegal memory access")

    third = dataclasses.replace(PROBLEM, direction="backward")
    monkeypatch.setattr(tune, "problems", lambda trial: [PROBLEM, third])
    monkeypatch.setattr(tune, "tune", break_the_device)
    with pytest.raises(RuntimeError, match="illegal"):
        tuning()
    status, (same, _, broken) = tuning()
    assert status == 1
    assert same == row
    assert broken["failures"] == {"shipped": "RuntimeError: illegal memory access"}


def test_a_launch_with_wrong_results_gets_no_time(tuning, monkeypatch):
    kernels = tune.PROVIDERS[IPSA]

    def wrong(shape, inputs):
        attend = kernels(shape, inputs)
        return lambda: 1.01 * attend()

    monkeypatch.setitem(tune.PROVIDERS, IPSA, wrong)
    status, (row,) = tuning()
    assert status == 1
    assert not row["candidates_ms"]
    assert all("over the budget" in reason for reason in row["failures"].values())


def test_what_the_kernels_refuse_is_not_tuned(monkeypatch):
    """On a GPU there is no backward pass of CPSA for exact products of float32."""
    pytest.importorskip("triton")
    monkeypatch.setattr(cpsa, "interpreting", lambda: False)
    for precision, served in (("float32", False), ("tf32", True)):
        monkeypatch.setattr(cpsa, "allows_tf32", lambda served=served: served)
        problem = tune.Problem(CPSA, "backward", FEW, precision)
        assert bool(problem.tables(None)) == served


@dataclasses.dataclass(frozen=True)
class Launch:
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class TileLaunch(Launch):
    block_c: int
    ahead: bool
    patches_high: int = 1
    patches_low: int = 16


def test_candidates_are_the_launch_with_a_plausible_change():
    shipped, *others = candidates("a table", Launch(4, 3))
    assert str(shipped) == "shipped"
    assert [other.launch for other in others] == [Launch(4, 1), Launch(4, 2), Launch(8, 3)]
    _, *others = (other.launch for other in candidates("a table", TileLaunch(4, 1, 8, False)))
    assert {TileLaunch(4, 1, 4, False), TileLaunch(4, 1, 4, True)} < set(others)
    # half a group is none, and the next tile is fetched where a tile is one group
    assert not {TileLaunch(4, 1, 2, False), TileLaunch(4, 1, 8, True)} & set(others)
    # of several passes, all change alike
    _, *others = candidates("a table", (Launch(4, 1), Launch(8, 1)))
    assert (Launch(4, 3), Launch(8, 3)) in [other.launch for other in others]


def test_a_candidate_is_launched_in_the_place_of_what_ships():
    pytest.importorskip("triton")
    table = "ipsa.launch.forward_launch"
    task = dataclasses.replace(PROBLEM.task(None), forward=True)
    shipped = looked_up(task)[table]
    other = dataclasses.replace(shipped, num_stages=shipped.num_stages + 1)
    with Candidate(table, other).launched():
        assert looked_up(task) == {table: other}
    assert looked_up(task) == {table: shipped}
