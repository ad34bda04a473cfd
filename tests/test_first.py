"""The first minutes on a GPU, rehearsed at a tiny size: killed in the middle, and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import figures, first, operation, prebuild, predictions, report
from catkernels.pool import Outcome

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
ABOUT = {"device": "a device", "torch": "2.11", "device_state": "clocks", "trial": False}


def test_a_line_that_was_cut_off_is_written_again(tmp_path):
    path = tmp_path / "first.jsonl"
    record = first.Record(path, ABOUT)
    record.add("one", [{"a": 1}], None, 0.5)
    record.add("two", [], "RuntimeError: illegal memory access", 0.5)
    with path.open("a") as file:
        file.write('{"key": "three", "rows"')
    again = first.Record(path, ABOUT | {"device_state": "other clocks"})
    assert again.holds("one")
    # what failed is tried again, and so is what is not whole
    assert not again.holds("two")
    assert not again.holds("three")
    again.add("three", [], None, 0.5)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("key") for line in lines] == [None, "one", "two", "three"]
    with pytest.raises(ValueError, match="another device"):
        first.Record(path, ABOUT | {"device": "another"})


def test_time_that_is_up_leaves_steps_and_says_which(tmp_path, monkeypatch):
    def apart(function, steps, *, until, **options):
        assert until == 17
        yield Outcome(steps[0], [{"a": 1}], None, 0.5)

    monkeypatch.setattr(first, "run_apart", apart)
    record = first.Record(tmp_path / "first.jsonl", ABOUT)
    steps = [first.Step("one", dict), first.Step("two", dict)]
    assert first._run(record, iter(steps), 17) == ["two"]
    assert record.holds("one")


def test_every_step_of_the_first_minutes_has_a_key_of_its_own(monkeypatch):
    """On Hopper, whose launches are looked up without one."""
    monkeypatch.delenv("TRITON_INTERPRET")
    code = (
        "from benchmarks.first import steps\n"
        "from triton.backends.compiler import GPUTarget\n"
        "print('\\n'.join(step.key for step in steps(GPUTarget('cuda', 90, 32), False)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    keys = done.stdout.splitlines()
    assert len(keys) == len(set(keys))
    assert keys[0] == "ceilings"
    # the MLP's weights streamed, which ships nowhere that its prediction is of
    (streamed,) = (key for key in keys if "resident_programs=0" in key)
    assert streamed.startswith("mlp small-stage1")
    for stage in range(1, 5):
        for direction in ("forward", "backward"):
            matching = [key for key in keys if f"stage{stage}" in key and direction in key]
            for attention in ("ipsa", "cpsa"):
                for provider in ("sdpa", "catkernels shipped", "compiled"):
                    assert any(attention in k and k.endswith(provider) for k in matching)


@pytest.mark.full
def test_a_killed_rehearsal_is_gone_on_with(tmp_path):
    path = tmp_path / "first.jsonl"
    command = [sys.executable, "-m", "benchmarks.first", str(path), "--trial"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    while not path.exists() or path.read_text().count('"key"') < 6:
        assert running.poll() is None
        time.sleep(0.2)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    kept = path.read_text().splitlines()
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=300, check=False)
    assert done.returncode == 0
    lines = path.read_text().splitlines()
    whole = [line for line in kept if first._parsed(line)]
    assert lines[: len(whole)] == whole
    keys = [json.loads(line)["key"] for line in lines[1:]]
    assert len(keys) == len(set(keys))
    assert "trial-training-b2 catkernels" in keys
    with pytest.raises(ValueError, match="trial"):
        report.read(path)


def timed(operation, direction, stage, provider, ms, **changes):
    """A row as `harness.race` writes it."""
    return {
        "operation": operation,
        "sweep": "stages",
        "name": f"small-stage{stage}-56x56-b256",
        "batch": 256,
        "dtype": "bfloat16",
        "direction": direction,
        "provider": provider,
        "contender_ms": ms,
        "official_ms": 1.0,
        "speedup": 1.0 / ms,
        "percent_of_roofline": 50.0,
        "official_percent_of_roofline": 10.0,
        "peak_mib": 1.0,
        "official_peak_mib": 2.0,
        "height": 56,
        "width": 56,
        "void": False,
    } | changes


def test_the_file_alone_becomes_tables_with_predictions_beside_them(tmp_path):
    record = first.Record(tmp_path / "first.jsonl", ABOUT)
    record.add("compile", [{"failures": []}], None, 1.0)
    record.add("a", [timed("cpsa", "forward", 1, "sdpa", 0.5)], None, 1.0)
    record.add("b", [timed("cpsa", "forward", 1, "catkernels", 0.2)], None, 1.0)
    faster = timed("cpsa", "forward", 1, "candidate", 0.1, launch="4 channels")
    record.add("c", [faster], None, 1.0)
    record.add("d", [timed("cpsa block", "forward", 1, "catkernels", 0.4)], None, 1.0)
    autocast = timed("cpsa block", "forward", 1, "catkernels", 0.5, dtype="autocast")
    record.add("e", [autocast], None, 1.0)
    report.file([record.path], tmp_path / "results")
    device = report.load(tmp_path / "results" / "a-device")
    rendered = report.render([device])
    # a launch that does not ship is neither a peer nor a figure of ours
    assert "0.2 ms, 5.00x (sdpa 2.00x), 50 %" in rendered
    expected = predictions.predictions()["CPSA", "forward", 1]
    assert (
        f"| CPSA forward | 1 | {expected.us} | 200 | {expected.percent} | 50 | 4 channels, 100 |"
    ) in rendered
    expected = predictions.predictions()["IPSA", "forward", 4]
    assert f"| IPSA forward | 4 | {expected.us} | not yet" in rendered
    for dtype, cell in (("bfloat16", "0.4 ms, 2.50x, 50 %"), ("autocast", "0.5 ms, 2.00x, 50 %")):
        assert f"| CPSA block | CAT-S, CAT-B | 256 | {dtype} | forward | {cell} |" in rendered
    # predicted was bfloat16
    assert "| 400 |" in next(row for row in rendered.splitlines() if "CPSA block forward" in row)
    figures.draw(device.rows, tmp_path, "a device")
    for prefix, title in (("", "CPSA"), ("block_", "CPSA block")):
        drawn = (tmp_path / f"{prefix}speedup.svg").read_text()
        assert f"{title} forward, CAT-S, batch 256, bfloat16" in drawn


def test_there_is_a_prediction_for_each_attention_pass_and_stage():
    predicted = predictions.predictions()
    for attention in ("IPSA", "CPSA"):
        for direction in ("forward", "backward"):
            assert all((attention, direction, stage) in predicted for stage in range(1, 5))


def test_every_prediction_is_of_something_timed():
    timed = {operation.title(name) for name in first.OPERATIONS}
    assert {name for name, _, _ in predictions.predictions()} <= timed


def test_a_prebuilt_cache_is_used_where_triton_is_the_same(tmp_path):
    assert not prebuild.fits(tmp_path)
    (tmp_path / "KEY").write_text(prebuild.triton_key() + "\n")
    assert prebuild.fits(tmp_path)
    (tmp_path / "KEY").write_text("another\n")
    assert not prebuild.fits(tmp_path)
