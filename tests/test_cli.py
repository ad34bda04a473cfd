"""The command line, as a user types it."""

from __future__ import annotations

import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import write_corrupt_dds

import catkernels
from catkernels import official
from catkernels.__main__ import main
from catkernels.cat import VARIANTS
from catkernels.commands import demo
from catkernels.torch_state import device


@pytest.fixture(autouse=True)
def _one_pass(monkeypatch):
    """The times do not matter here."""
    monkeypatch.setattr(demo, "REPEATS", 1)


def test_info_names_versions_and_says_what_would_serve(capsys):
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    assert torch.__version__ in output
    for operation in ("ipsa float32", "cpsa float32", "ipsa bfloat16", "cpsa bfloat16"):
        assert operation in output
    assert "cpu: " in output


def test_info_without_a_device(capsys, monkeypatch):
    monkeypatch.setattr(device, "interpreting", lambda: False)
    main(["info"])
    _, on_cpu = capsys.readouterr().out.split("\ncpu: ")
    operations = [line for line in on_cpu.split("\n\n")[0].splitlines() if "psa" in line]
    assert len(operations) == 6
    for line in operations:
        assert "reference  (" in line
        assert "the tensors are on cpu, the kernels need cuda or xpu)" in line


def test_demo_compares_and_draws(capsys, tmp_path):
    picture = tmp_path / "demo.png"
    photo = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 70, 3), np.uint8)).save(photo)
    options = ["--model", "cat_tiny", "--size", "60", "--batch", "2", "--image", str(photo)]
    assert main(["demo", *options, "--save", str(picture)]) == 0
    output = capsys.readouterr().out
    assert "cat_tiny, random weights, 2 x 60 x 60" in output
    assert "18 blocks patched" in output
    rows = [line.split() for line in output.splitlines() if line[:1] in "1234" and line[:1]]
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    assert [row[1] for row in rows] == ["15x15x64", "8x8x128", "4x4x256", "2x2x512"]
    assert all(float(row[-1]) < 1e-3 for row in rows)
    assert matplotlib.image.imread(picture).std() > 0.05


def test_demo_loads_a_checkpoint(capsys, tmp_path):
    torch.save({"model": official.CAT(**VARIANTS["cat_tiny"]).state_dict()}, tmp_path / "cat.pth")
    options = ["--model", "cat_tiny", "--size", "32", "--batch", "1"]
    picture = ["--save", str(tmp_path / "demo.png")]
    assert main(["demo", *options, *picture, "--checkpoint", str(tmp_path / "cat.pth")]) == 0
    output = capsys.readouterr().out
    assert "converted ape: (1, 3136, 64) -> (1, 64, 8, 8)" in output
    assert "cat_tiny, cat.pth" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "{text}"], "cannot read the image"),
        (["--image", "{corrupt}"], "corrupt.dds: Unimplemented pixel format"),
        (["--image", "nowhere.jpg"], "No such file"),
        (["--model", "cat_huge"], "invalid choice: 'cat_huge'"),
        (["--checkpoint", "{text}"], "is no checkpoint that torch.save wrote"),
        (["--checkpoint", "nowhere.pth"], "there is no checkpoint file"),
        (["--checkpoint", "{other}"], "holds none of the model's weights"),
        (["--size", "0"], "'0' is not a whole number from 1 to 4096"),
        (["--batch", "999999999999"], "is not a whole number from 1 to 1024"),
        (["--save", "nowhere/demo.png"], "there is no folder nowhere"),
        (["--save", "demo.docx"], "the picture is a .png"),
    ],
)
def test_demo_errors_are_one_line_and_exit_2(arguments, message, tmp_path, capfd):
    (tmp_path / "text.txt").write_text("neither an image nor weights")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    files = {"text": tmp_path / "text.txt", "other": tmp_path / "other.pth"}
    files["corrupt"] = write_corrupt_dds(tmp_path / "corrupt.dds")
    arguments = [argument.format(**files) for argument in arguments]
    if "--model" not in arguments:
        arguments += ["--model", "cat_tiny"]
    try:
        status = main(["demo", *arguments])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    output, errors = capfd.readouterr()
    assert output == ""
    assert message in errors
    assert len(errors.splitlines()) == 1


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"catkernels {catkernels.__version__}\n"


def test_the_module_runs_as_a_program():
    command = [sys.executable, "-m", "catkernels"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "info" in result.stderr
