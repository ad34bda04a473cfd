"""`python -m catkernels check`: what is wrong, crashes or does not compile is named."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from catkernels.__main__ import main
from catkernels.cases import CPSACase, IPSACase, Shape, make_cpsa_inputs
from catkernels.commands import check
from catkernels.families import Task, compile_case
from catkernels.pool import run_apart

TINY = IPSACase("tiny", 1, 7, 9, num_heads=1, head_dim=16)
ON_CPU = Task("family", (), torch.float32, False, "cpu", repeats=1)


@dataclass(frozen=True)
class Faulty:
    """A case whose kernels would be wrong in the way that its name says."""

    name: str
    dropout_p: float = 0.0
    mixed: bool = False

    @property
    def shape(self) -> Shape:
        return CPSACase("", 1, 7, 14, 4).shape

    def inputs(self, dtype, device, seed):
        return make_cpsa_inputs(self.shape, dtype, device, seed=seed)

    def specified(self, *inputs):
        return CPSACase("", 1, 7, 14, 4).specified(*inputs)

    def attend(self, *inputs):
        out = self.specified(*inputs)
        if self.name == "raise":
            raise RuntimeError("no such instruction")
        if self.name == "die":
            os._exit(7)
        if self.name == "wrong":
            return out * 1.001
        if self.name == "unwritten":
            return torch.empty_like(out).copysign(out)
        if self.name == "other bits":
            return out + 1e-7 * torch.rand(())
        return out

    def unsupported_reasons(self, device, dtype, needs_grad):
        return ["exact products have no backward pass"] if needs_grad else []


@pytest.mark.parametrize(
    ("name", "verdict", "detail"),
    [
        ("right", "right", "1 calls, 1 of them forward only"),
        ("wrong", "wrong", "out: largest error"),
        ("unwritten", "wrong", "values are not finite"),
        ("other bits", "wrong", "out has other bits"),
    ],
)
def test_what_is_wrong_is_said(name, verdict, detail):
    row = check.judge(replace(ON_CPU, cases=(Faulty(name),)))
    assert row.verdict == verdict
    assert detail in row.detail


def test_a_family_that_crashes_is_lost_and_the_run_is_not(monkeypatch, tmp_path, capsys):
    tasks = [
        replace(ON_CPU, family=name, cases=(Faulty(name),)) for name in ("right", "die", "wrong")
    ]
    monkeypatch.setattr(check, "interpreted_rows", lambda: check.judged_rows(tasks, workers=1))
    path = tmp_path / "check.json"
    assert main(["check", "--interpret", "--json", str(path)]) == 1
    printed = capsys.readouterr().out
    assert "its process ended with exit status 7" in printed
    # the assembler of NVIDIA's GPUs alone
    assert ("TRITON_PTXAS_PATH" in printed) == torch.cuda.is_available()
    assert 'backend="reference"' in printed
    stored = json.loads(path.read_text())
    verdicts = {row["name"]: row["verdict"] for row in stored["rows"]}
    assert verdicts == {
        "right, float32": "right",
        "die, float32": "crashed",
        "wrong, float32": "wrong",
    }
    assert stored["verdict"] in printed
    assert stored["machine_info"]["torch"] == torch.__version__


def test_on_an_nvidia_gpu_a_newer_assembler_is_to_be_tried(monkeypatch, capsys):
    about = {"device": "a GPU", "ptxas": "12.8.93"}
    monkeypatch.setattr(check.machine, "describe", lambda: about)
    rows = [check.Row("ipsa, float16", "crashed", "its process ended with exit status 7")]
    monkeypatch.setattr(check, "interpreted_rows", lambda: iter(rows))
    assert main(["check", "--interpret"]) == 1
    printed = capsys.readouterr().out
    assert "ptxas 12.8.93" in printed
    assert "TRITON_PTXAS_PATH" in printed


def test_where_the_kernels_serve_nothing_nothing_is_called_right(monkeypatch, capsys):
    @dataclass(frozen=True)
    class Unserved(Faulty):
        def unsupported_reasons(self, device, dtype, needs_grad):
            return ["Triton is not installed"]

    row = check.judge(replace(ON_CPU, cases=(Unserved("right"),)))
    assert (row.verdict, row.detail) == ("not served", "by the kernels: Triton is not installed")
    monkeypatch.setattr(check, "interpreted_rows", lambda: iter([row]))
    assert main(["check", "--interpret"]) == 1
    printed = capsys.readouterr().out
    assert "nothing was checked in Triton's interpreter" in printed
    assert "all right" not in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_called_right(capsys):
    assert main(["check"]) == 2
    assert "--interpret" in capsys.readouterr().err


def test_a_small_subset_is_checked_in_the_interpreter(capsys):
    pytest.importorskip("triton")
    assert main(["check", "--interpret"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" right    ") == 4
    assert "all right in Triton's interpreter" in printed


def test_compiling_ahead_fills_the_cache_for_the_launch(tmp_path):
    """Without a GPU, for one; what is compiled again comes from the cache."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", 90, 32)
    task = replace(ON_CPU, cases=(TINY,), dtype=torch.bfloat16, device="cuda", target=target)
    broken = replace(task, family="broken", cases=(Faulty("raise"),))
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}

    def compile_once() -> set[Path]:
        done = list(run_apart(compile_case, [task, broken], workers=1, environment=environment))
        good, bad = sorted(done, key=lambda outcome: outcome.task.family, reverse=True)
        assert good.failure is None
        assert good.result >= 2
        assert bad.failure == "RuntimeError: no such instruction"
        return set(tmp_path.rglob("*.cubin"))

    first = compile_once()
    assert {path.stem for path in first} >= {"ipsa_forward_kernel", "ipsa_backward_kernel"}
    assert compile_once() == first
