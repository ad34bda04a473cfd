"""``python -m catkernels demo`` on photos, as a user types it; on digits in test_digits.py."""

from __future__ import annotations

import json

import matplotlib.image
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_training import write_corrupt_dds

from catkernels import official
from catkernels.__main__ import main
from catkernels.cat import CAT, VARIANTS
from catkernels.commands import digits_demo, photo_demo
from catkernels.commands.models import MODELS
from catkernels.digits import WEIGHTS


@pytest.fixture(autouse=True)
def _one_pass(monkeypatch):
    """The times do not matter here."""
    monkeypatch.setattr(photo_demo, "REPEATS", 1)


def test_demo_compares_and_draws(capsys, tmp_path):
    picture = tmp_path / "demo.png"
    photo = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 70, 3), np.uint8)).save(photo)
    options = ["--model", "cat_tiny", "--size", "60", "--batch", "2", "--image", str(photo)]
    assert main(["demo", *options, "--save", str(picture)]) == 0
    output = capsys.readouterr().out
    assert "cat_tiny, random weights, 2 x 60 x 60" in output
    assert "18 blocks patched" in output
    assert max(map(len, output.splitlines()[:-1])) <= 80  # all but the path of the picture
    rows = [line.split() for line in output.splitlines() if line[1:2] == " " and line[0] in "1234"]
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    assert [row[1] for row in rows] == ["15x15x64", "8x8x128", "4x4x256", "2x2x512"]
    assert all(row[2:-4] == ["cpu", "slices"] for row in rows)
    assert all(float(row[-1]) < 1e-3 for row in rows)
    assert matplotlib.image.imread(picture).std() > 0.05


def test_demo_loads_a_checkpoint(capsys, tmp_path):
    torch.save({"model": official.CAT(**VARIANTS["cat_tiny"]).state_dict()}, tmp_path / "cat.pth")
    options = ["--model", "cat_tiny", "--size", "32", "--batch", "1"]
    picture = ["--save", str(tmp_path / "demo.png")]
    assert main(["demo", *options, *picture, "--checkpoint", str(tmp_path / "cat.pth")]) == 0
    output = capsys.readouterr().out
    assert output.startswith("246 tensors loaded\n")
    assert "cat_tiny, cat.pth" in output


@pytest.mark.parametrize(
    ("model", "size", "channels"),
    # the last two have smaller patches in some stage than the model has at its own size
    [("digits", 16, 3), ("digits", 6, 3), ("cat_tiny", 40, 1)],
)
def test_demo_of_what_training_wrote(model, size, channels, capsys, tmp_path):
    """Whatever images it was of, without a word of which model it is."""
    options = MODELS[model] | {"img_size": size, "in_chans": channels, "num_classes": 2}
    about = {"options": {"model": model, "size": size, "classes": ["cat", "dog"]}}
    header = {"catkernels": json.dumps(about)}
    save_file(CAT(**options).state_dict(), tmp_path / "model.safetensors", header)
    files = ["--checkpoint", str(tmp_path / "model.safetensors"), "--save", str(tmp_path / "d.png")]
    assert main(["demo", "--batch", "1", *files]) == 0
    output = capsys.readouterr().out
    assert f"{model}, model.safetensors, 1 x {size} x {size}" in output
    assert "unexpected" not in output


def test_a_noisy_moment_makes_times_void(capsys, monkeypatch):
    # after a pass of each that is not timed: official 0.1 s, patched 0.5 s, official 0.2 s
    times = iter([0.0] * 6 + [0.0, 0.1, 1.0, 1.5, 2.0, 2.2])
    network = official.CAT(**(MODELS["digits"] | {"depths": (1,), "num_heads": (1,)})).eval()
    monkeypatch.setattr(photo_demo, "_now", lambda _: next(times))
    (stage,), report = photo_demo.compare(network, torch.randn(2, 1, 16, 16))
    assert stage.is_void
    assert (stage.official_ms, stage.patched_ms) == (pytest.approx(50), pytest.approx(250))
    assert len(report.swapped) == 3
    assert stage.served_by == "cpu slices"
    photo_demo._print_comparison("title", report, [stage])
    # of the stage, and of the total that counts it
    assert capsys.readouterr().out.count("0.20x*") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "{text}"], "cannot read the image"),
        (["--image", "{corrupt}"], "corrupt.dds: Unimplemented pixel format"),
        (["--image", "nowhere.jpg"], "No such file"),
        (["--model", "cat_huge"], "invalid choice: 'cat_huge'"),
        (["--checkpoint", "{text}"], "is no checkpoint that torch.save wrote"),
        (["--checkpoint", "nowhere.pth"], "there is no checkpoint file"),
        (["--checkpoint", "{other}"], "is of none of the models digits, cat_tiny"),
        (["--checkpoint", "{digits}"], "is of digits, not of cat_tiny: leave --model out"),
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
    files["digits"] = WEIGHTS
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


def test_neither_demo_writes_over_the_others_picture(monkeypatch):
    saved = []
    for demo in (photo_demo, digits_demo):
        monkeypatch.setattr(demo, "run", lambda *_, save, **options: saved.append(save.name))
    for model in ("digits", "cat_tiny"):
        assert main(["demo", "--model", model]) == 0
    assert saved == ["catkernels-digits.png", "catkernels-photo.png"]
