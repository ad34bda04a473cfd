"""The benchmarks' own arithmetic, and that a wrong result is never timed."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dense_cases import sampled

import catkernels.cpu
from benchmarks import bench_block, figures, harness, operation, report, roofline
from benchmarks.bench_cpsa import CPSA
from benchmarks.bench_ipsa import IPSA
from benchmarks.roofline import Ceilings, Work
from catkernels.cases import Shape

SMALL = Shape("two windows", batch=1, height=2, width=4, channels=8, num_heads=2, patch_size=2)
PADDED = Shape("padded", batch=3, height=3, width=2, channels=4, num_heads=1, patch_size=2)
STAGE4 = Shape("one patch", batch=2, height=7, width=7, channels=768, num_heads=24)

# By hand, with maps of 64, 72 and 75264 values, tables of 18, 9 and 4056 and weights of 80, 80 and
# 9800. A product of attention takes 2 x (windows x tokens) x tokens x C; one of all patches with a
# folded matrix 2 x patches x N^4, one with one another 2 x patches x P x N^2.
HAND_COUNTS = [
    (roofline.ipsa_forward_work, SMALL, 4 * 64 + 18, 2 * (2 * 8 * 4 * 8)),
    (roofline.ipsa_forward_work, PADDED, 4 * 72 + 9, 2 * (2 * 24 * 4 * 4)),
    (roofline.ipsa_forward_work, STAGE4, 4 * 75264 + 4056, 2 * (2 * 98 * 49 * 768)),
    (roofline.ipsa_backward_work, SMALL, 7 * 64 + 36, 5 * (2 * 8 * 4 * 8)),
    (roofline.ipsa_backward_work, PADDED, 7 * 72 + 18, 5 * (2 * 24 * 4 * 4)),
    (roofline.ipsa_backward_work, STAGE4, 7 * 75264 + 8112, 5 * (2 * 98 * 49 * 768)),
    (roofline.cpsa_forward_work, SMALL, 2 * 64 + 80, 2 * (2 * 16 * 16) + 2 * (2 * 16 * 2 * 4)),
    (roofline.cpsa_forward_work, PADDED, 2 * 72 + 80, 2 * (2 * 24 * 16) + 2 * (2 * 24 * 2 * 4)),
    (roofline.cpsa_forward_work, STAGE4, 2 * 75264 + 9800, 2 * 1536 * 2401),
    (roofline.cpsa_backward_work, SMALL, 3 * 64 + 160, 5 * (2 * 16 * 16) + 6 * (2 * 16 * 2 * 4)),
    (roofline.cpsa_backward_work, PADDED, 3 * 72 + 160, 5 * (2 * 24 * 16) + 6 * (2 * 24 * 2 * 4)),
    (roofline.cpsa_backward_work, STAGE4, 3 * 75264 + 19600, 2 * (2 * 1536 * 2401)),
    # 8 channels: 2 x 8 values of a norm, (8 + 1) x 8 of a linear layer, 32 x (8 + 1) + 8 x (32 + 1)
    # of an MLP; a linear layer of the 64 values takes 2 x 64 x 8
    (roofline.norm_forward_work, SMALL, 2 * 64 + 16, 0),
    (roofline.norm_backward_work, SMALL, 4 * 64 + 32, 0),
    (roofline.norm_qkv_forward_work, SMALL, 4 * 64 + 16 + 3 * 72, 3 * 1024),
    (roofline.norm_qkv_backward_work, SMALL, 6 * 64 + 32 + 6 * 72, 6 * 1024),
    (roofline.proj_residual_forward_work, SMALL, 3 * 64 + 72, 1024),
    (roofline.proj_residual_backward_work, SMALL, 3 * 64 + 144, 2 * 1024),
    (roofline.mlp_forward_work, SMALL, 2 * 64 + 16 + 552, 8 * 1024),
    (roofline.mlp_backward_work, SMALL, 3 * 64 + 32 + 1104, 20 * 1024),
    # the table has 18 values, CPSA's weights 80
    (roofline.ipsa_block_forward_work, SMALL, 2 * 64 + 890, 12 * 1024 + 2 * 512),
    (roofline.ipsa_block_backward_work, SMALL, 3 * 64 + 1780, 32 * 1024 + 6 * 512),
    (roofline.cpsa_block_forward_work, SMALL, 2 * 64 + 664, 8 * 1024 + 1536),
    (roofline.cpsa_block_backward_work, SMALL, 3 * 64 + 1328, 20 * 1024 + 3 * 1536),
]


@pytest.mark.parametrize(
    ("model", "shape", "values", "flops"),
    HAND_COUNTS,
    ids=[f"{model.__name__}-{shape}" for model, shape, *_ in HAND_COUNTS],
)
def test_work_is_what_a_hand_counts(model, shape, values, flops):
    assert model(shape, 2) == Work(2 * values, flops)
    assert model(shape, 4) == Work(4 * values, flops)


def test_a_step_is_both_passes():
    step = IPSA.work(SMALL, torch.float32, "step")
    assert step == Work(4 * (11 * 64 + 3 * 18), 7 * (2 * 8 * 4 * 8))


def test_the_binding_ceiling():
    ceilings = Ceilings(bytes_per_s=100.0, flops_per_s=1000.0)
    assert ceilings.least_s(Work(200, 1000)) == 2.0
    assert ceilings.bound(Work(200, 1000)) == "memory"
    assert ceilings.least_s(Work(100, 5000)) == 5.0
    assert ceilings.bound(Work(100, 5000)) == "compute"


class Stopwatch(SimpleNamespace):
    """In the place of pytest-benchmark's fixture: it remembers what it was asked to time."""

    def __init__(self, enabled: bool = True) -> None:
        super().__init__(extra_info={}, group=None, enabled=enabled, timed=[])

    def pedantic(self, target, *, setup=None, rounds=0):
        for _ in range(rounds):
            setup()
        self.timed.append(target)
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[2.0, 1.0, 4.0]))


def with_a_wrong(provider: str, subject: operation.Operation) -> operation.Operation:
    """The attention with one provider whose results are a thousandth off."""

    def wrong(shape, inputs):
        attend = subject.providers[provider](shape, inputs)
        return lambda: 1.001 * attend()

    return dataclasses.replace(subject, providers=subject.providers | {provider: wrong})


both = pytest.mark.parametrize("subject", [IPSA, CPSA], ids=lambda subject: subject.name)


@both
@pytest.mark.parametrize("direction", ["forward", "backward", "step"])
@pytest.mark.parametrize("provider", ["sdpa", "catkernels"])
def test_a_right_provider_is_timed(subject, direction, provider, monkeypatch):
    monkeypatch.setattr(operation, "ROUNDS", 2)
    monkeypatch.setattr(roofline, "ceilings", lambda dtype: Ceilings(1.0, 1.0))
    case = operation.Case("trial", operation.TRIAL_SHAPE, "float32", direction)
    stopwatch = Stopwatch()
    with harness.own_stream():
        operation.run(stopwatch, subject, case, provider)
    assert len(stopwatch.timed) == 1
    info = stopwatch.extra_info
    assert info["provider"] == provider
    assert info["speedup"] == pytest.approx(info["official_ms"] / info["contender_ms"])


@pytest.mark.usefixtures("device", "round_to_nearest_bf16", "launches", "tf32_on_gpus")
@pytest.mark.parametrize("subject", sampled(bench_block.PARTS, bench_block.BLOCKS), ids=str)
def test_blocks_and_their_parts_are_judged_by_kernels(subject, monkeypatch):
    """As on a GPU, in the mode that most train in."""
    monkeypatch.setattr(roofline, "ceilings", lambda dtype: Ceilings(1.0, 1.0))
    make = functools.partial(bench_block.our_block, backend="triton")
    monkeypatch.setattr(bench_block, "our_block", make)
    shape = Shape("one window", batch=1, height=7, width=7, channels=32, num_heads=1)
    stopwatch = Stopwatch(enabled=False)
    operation.run(stopwatch, subject, operation.Case("", shape, "autocast", "step"), "catkernels")
    assert stopwatch.extra_info["served_by"].startswith("triton")


@both
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_wrong_provider_gets_no_number(subject, direction):
    case = operation.Case("trial", operation.TRIAL_SHAPE, "float32", direction)
    for provider, outcome in (("catkernels", AssertionError), ("sdpa", pytest.skip.Exception)):
        stopwatch = Stopwatch()
        with pytest.raises(outcome, match="over the budget"):
            operation.run(stopwatch, with_a_wrong(provider, subject), case, provider)
        assert not stopwatch.timed


def test_a_missing_result_is_wrong():
    truth = {"output": torch.ones(2, dtype=torch.float64)}
    with pytest.raises(AssertionError, match="gradient"):
        harness.judge({}, {}, truth | {"gradient": truth["output"]})


@both
def test_inference_on_a_cpu_is_what_users_get(subject, monkeypatch):
    """A map that is a Parameter, say, would be timed through the reference."""
    if roofline.DEVICE.type != "cpu":
        pytest.skip("a GPU has another path")
    fast, calls = getattr(catkernels.cpu, f"{subject.name}_attention"), []

    def counted(*args, **options):
        calls.append(args)
        return fast(*args, **options)

    monkeypatch.setattr(catkernels.cpu, f"{subject.name}_attention", counted)
    leaves = operation.make_leaves(subject, operation.TRIAL_SHAPE, torch.float32)
    attend = subject.providers["catkernels"](operation.TRIAL_SHAPE, leaves)
    operation.workload("forward", attend, leaves)()
    assert calls


ROOT = Path(__file__).parent.parent


def test_every_program_finds_what_it_imports():
    programs = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
    assert "convergence" in programs
    for program in programs:
        # what pytest itself loads, under a name of its own
        if program != "conftest":
            importlib.import_module(f"benchmarks.{program}")


def run_benchmarks(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "--benchmark", "-p", "no:cacheprovider", *arguments]
    # pytest-benchmark times nothing where it finds the variables of a pytest-xdist worker
    left_out = ("TRITON_INTERPRET", "PYTEST_XDIST")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def stored_run(tmp_path_factory) -> dict:
    """A run of the smallest shapes of the real sweep, as if there had been no noise."""
    path = tmp_path_factory.mktemp("runs") / "run.json"
    done = run_benchmarks("-k", "stages and stage4 and b1-", f"--benchmark-json={path}")
    assert done.returncode == 0, done.stdout
    run = json.loads(path.read_text())
    for benchmark in run["benchmarks"]:
        benchmark["extra_info"]["void"] = False
    return run


def test_a_stored_run_becomes_tables_and_figures(stored_run, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(stored_run))
    report.file([path], tmp_path / "results")
    (stored,) = (tmp_path / "results").glob("*/run.json")
    device = report.load(stored.parent)
    figures.draw(device.rows, device.folder, "a device")
    rendered = report.render([device])
    for row in device.rows:
        if row["provider"] == "catkernels":
            peer = report.best_peer(row, device.rows)
            cell = f"{row['contender_ms']:.3g} ms, {row['speedup']:.2f}x"
            assert f"{cell} (sdpa {peer['speedup']:.2f}x)" in rendered
    for name in ("speedup", "roofline"):
        assert f"{name}.svg)" in rendered
        assert "catkernels" in (device.folder / f"{name}.svg").read_text()
    assert ("Not measured yet" in rendered) != device.is_gpu


def test_the_best_peer_of_a_row():
    def row(provider, speedup, **changes):
        case = {"operation": "ipsa", "name": "stage1", "dtype": "float32", "direction": "step"}
        return case | {"provider": provider, "speedup": speedup} | changes

    ours, best = row("catkernels", 1.5), row("compiled", 2.0)
    others = [
        row("official", 9.0),
        row("sdpa", 1.9),
        row("sdpa", 9.0, direction="forward"),
        row("sdpa", 9.0, name="stage2"),
        row("sdpa", 9.0, operation="cpsa"),
        row("sdpa", 9.0, dtype="bfloat16"),
    ]
    assert report.best_peer(ours, [ours, *others, best]) is best
    assert report.best_peer(ours, [ours]) is None


def test_the_latest_run_of_a_benchmark_counts(stored_run, tmp_path):
    later = json.loads(json.dumps(stored_run | {"datetime": "9999-12-31T00:00:00"}))
    for benchmark in later["benchmarks"]:
        benchmark["extra_info"]["contender_ms"] = 123.0
    # by name the later run comes first
    for name, run in (("a", later), ("b", stored_run)):
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    report.file([tmp_path / "a.json", tmp_path / "b.json"], tmp_path / "results")
    (folder,) = (tmp_path / "results").iterdir()
    device = report.load(folder)
    assert [row["contender_ms"] for row in device.rows] == [123.0] * len(stored_run["benchmarks"])
    assert device.date == "9999-12-31"


def test_a_trial_is_never_reported(stored_run, tmp_path):
    trial = tmp_path / "trial.json"
    trial.write_text(json.dumps(stored_run | {"machine_info": {"device_state": "", "trial": True}}))
    good = tmp_path / "good.json"
    good.write_text(json.dumps(stored_run))
    with pytest.raises(ValueError, match="trial"):
        report.file([good, trial], tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_the_report_replaces_what_is_between_its_markers():
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    once = report.insert(text, "new")
    assert once == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    assert report.insert(once, "new") == once
    for broken in ("no markers", report.BEGIN, report.END + report.BEGIN, text + text):
        with pytest.raises(ValueError, match="needs one"):
            report.insert(broken, "new")


def test_disabled_benchmarks_still_judge():
    """So a profiler sees each contender once."""
    one = "test_ipsa and forward and catkernels"
    done = run_benchmarks("--trial", "--benchmark-disable", "-k", one)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def test_out_of_time_is_a_failure():
    one = "test_ipsa and forward and catkernels"
    done = run_benchmarks("--trial", "--time-limit=0", "-k", one)
    assert done.returncode == 1
    assert "out of time" in done.stdout


def run_parts(*arguments: str, path: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "benchmarks" / "run_gpu.sh"), *arguments]
    environment = os.environ | {"PATH": path}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=60, check=False
    )


def test_a_part_that_fails_is_named_and_fails_the_run(tmp_path):
    broken = tmp_path / "python3"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    done = run_parts(str(tmp_path / "out"), "check", "tune", path=path)
    assert done.returncode == 1
    assert "FAILED: check tune" in done.stderr
    assert "FAILED: check tune" in (tmp_path / "out" / "log.txt").read_text()


def test_an_unknown_part_runs_nothing(tmp_path):
    done = run_parts(str(tmp_path / "out"), "check", "chekc", path=os.environ["PATH"])
    assert done.returncode == 2
    assert "no part is called chekc" in done.stderr
    assert not (tmp_path / "out" / "log.txt").exists()
