"""The command line, as a user types it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import catkernels
from catkernels.__main__ import main
from catkernels.commands import info


def test_info_names_versions_and_says_what_would_serve(capsys):
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    assert f"catkernels {catkernels.__version__}, torch {torch.__version__}" in output
    *_, on_cpu = output.split("\ncpu: ")
    for operation in ("ipsa", "cpsa"):
        assert f"  {operation} float32, float16, bfloat16: reference\n" in on_cpu


@pytest.mark.parametrize("interpreted", [True, False])
def test_info_says_one_short_reason_on_a_cpu(interpreted, capsys, monkeypatch):
    monkeypatch.setattr(info, "interpreting", lambda: interpreted)
    main(["info"])
    _, on_cpu = capsys.readouterr().out.split("\ncpu: ")
    reasons = [line for line in on_cpu.split("\n\n")[0].splitlines() if "why not" in line]
    if interpreted:
        assert "interpreted" in reasons[0]
        assert len(reasons) == 1
    else:
        assert reasons == ["  why not triton: the kernels need a GPU (cuda or xpu)"]


def test_info_of_a_gpu_tells_dtypes_and_reasons_apart(capsys, monkeypatch):
    monkeypatch.setattr(info, "_reasons", lambda *call: ["none"] if call[2].itemsize == 4 else [])
    info._print_serving(torch.device("cuda"))
    assert capsys.readouterr().out.splitlines() == [
        "  ipsa float32: reference",
        "  ipsa float16, bfloat16: triton",
        "  cpsa float32: reference",
        "  cpsa float16, bfloat16: triton",
        "  why not triton: none",
    ]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("two\nlines"), "two lines"),
        (PermissionError(13, "Permission denied", "run"), "Permission denied: run"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (FileNotFoundError("there is no file"), "there is no file"),
        (MemoryError(), "there is not enough memory: smaller images"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "there is not enough memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "there is not enough memory: smaller images",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_are_one_sentence(error, message, capsys, monkeypatch):
    def fail() -> None:
        raise error

    monkeypatch.setattr(info, "run", fail)
    assert main(["info"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m catkernels info: {message}")
    assert "Errno" not in line


def test_a_fault_of_the_package_keeps_its_traceback(monkeypatch):
    def fail() -> None:
        raise RuntimeError("the size of tensor a must match")

    monkeypatch.setattr(info, "run", fail)
    with pytest.raises(RuntimeError, match="the size of tensor"):
        main(["info"])


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"catkernels {catkernels.__version__}\n"


def test_the_module_runs_as_a_program():
    command = [sys.executable, "-m", "catkernels"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "info" in result.stderr
