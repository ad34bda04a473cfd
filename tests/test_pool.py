"""Tasks in processes of their own: one that fails, dies or hangs takes no other along."""

from __future__ import annotations

import os
import time

from catkernels.pool import run_apart


def do(task: str) -> str:
    if task == "raise":
        raise RuntimeError("the device is lost")
    if task == "die":
        os._exit(7)
    if task == "hang":
        time.sleep(60)
    return f"{task} {os.environ.get('TRITON_INTERPRET')}"


def test_a_task_that_fails_takes_no_other_along():
    tasks = ["one", "raise", "die", "two", "hang", "three"]
    done = run_apart(do, tasks, workers=2, timeout_s=3, environment={"TRITON_INTERPRET": "0"})
    outcomes = {outcome.task: outcome for outcome in done}
    assert outcomes.keys() == set(tasks)
    for task in ("one", "two", "three"):
        assert outcomes[task].result == f"{task} 0"
        assert outcomes[task].failure is None
    assert outcomes["raise"].failure == "RuntimeError: the device is lost"
    assert outcomes["die"].failure == "its process ended with exit status 7"
    assert outcomes["hang"].failure == "not done after 3 s"


def test_no_task_is_begun_when_time_is_up():
    assert list(run_apart(do, ["one"], workers=1, until=time.monotonic() - 1)) == []


def test_who_has_had_enough_waits_for_nothing():
    start = time.monotonic()
    for outcome in run_apart(do, ["one", "hang"], workers=1):
        assert outcome.task == "one"
        break
    assert time.monotonic() - start < 50


def test_a_task_is_ended_when_time_is_up():
    until = time.monotonic() + 1
    hung, *rest = run_apart(do, ["hang", "one"], workers=1, until=until)
    assert "not done after" in hung.failure
    assert not rest
