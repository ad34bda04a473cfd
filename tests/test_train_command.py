"""``python -m catkernels train``, as a user types it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import pytest
import torch
from fresh_process import ROOT, run_python
from safetensors.torch import load_file
from tiny_training import SMALL, write_photos

from catkernels.__main__ import main
from catkernels.digits import WEIGHTS
from catkernels.training import run_folder
from catkernels.training.trainer import Trainer


@pytest.fixture
def photos(tmp_path) -> Path:
    return write_photos(tmp_path / "photos")


def train_command(photos: Path, output: Path, *more: str) -> list[str]:
    return ["train", "--data", str(photos), "--output", str(output), *SMALL, *more]


def test_a_run_leaves_weights_metrics_and_a_curve(photos, tmp_path, capsys):
    (photos / "dark" / "0.png").write_text("no image")
    output = tmp_path / "run"
    assert main(train_command(photos, output, "--epochs", "3")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "left out: cannot read the image" in lines[0]
    assert lines[1] == "1 of 20 images cannot be read and are left out"
    assert "15 images of 2 classes, 4 held out" in lines[2]

    header, *rows = (output / "metrics.csv").read_text().splitlines()
    assert header == "epoch,learning_rate,train_loss,test_loss,test_accuracy,seconds"
    assert [row.split(",")[0] for row in rows] == ["1", "2", "3"]
    accuracy = float(rows[-1].split(",")[4])
    assert lines[-1] == f"test accuracy {100 * accuracy:.1f} %"
    assert matplotlib.image.imread(output / "curve.png").std() > 0.05
    assert {file.name for file in output.iterdir()} == {
        "checkpoint.pt",
        "curve.png",
        "metrics.csv",
        "model.safetensors",
    }


def test_killed_it_resumes_to_the_very_same_weights(photos, tmp_path, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    epochs = ("--epochs", "20")
    assert main(train_command(photos, whole, *epochs)) == 0

    process = subprocess.Popen(
        [sys.executable, "-m", "catkernels", *train_command(photos, killed, *epochs)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    while not (killed / "checkpoint.pt").exists():
        assert process.poll() is None, "it ended without a checkpoint"
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "model.safetensors").exists()

    capsys.readouterr()
    assert main(train_command(photos, killed, *epochs, "--resume")) == 0
    assert "resumed after step" in capsys.readouterr().out
    weights = [(run / "model.safetensors").read_bytes() for run in (whole, killed)]
    assert weights[0] == weights[1]


def test_interrupted_within_an_epoch_it_resumes_to_the_same_weights(
    photos, tmp_path, monkeypatch, capsys
):
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    epochs = ("--epochs", "2")
    assert main(train_command(photos, whole, *epochs)) == 0

    train_step = Trainer._train_step

    def interrupted_step(trainer: Trainer, *batch) -> None:
        if trainer.step == 3:
            raise KeyboardInterrupt
        train_step(trainer, *batch)

    monkeypatch.setattr(run_folder, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(Trainer, "_train_step", interrupted_step)
    assert main(train_command(photos, interrupted, *epochs)) == 130
    monkeypatch.setattr(Trainer, "_train_step", train_step)
    capsys.readouterr()
    assert main(train_command(photos, interrupted, *epochs, "--resume")) == 0
    assert "resumed after step 3 of 4" in capsys.readouterr().out
    weights = [(run / "model.safetensors").read_bytes() for run in (whole, interrupted)]
    assert weights[0] == weights[1]


def test_a_finished_run_is_kept(photos, tmp_path, capsys):
    command = train_command(photos, tmp_path / "run", "--epochs", "1")
    assert main([*command, "--resume"]) == 2
    assert "there is no run in" in capsys.readouterr().err
    assert main(command) == 0
    result = capsys.readouterr().out.splitlines()[-1]
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()

    assert main(command) == 2
    assert "holds a run already: go on with it by --resume" in capsys.readouterr().err
    assert main([*command, "--resume", "--seed", "1"]) == 2
    assert "seed was 0 and is now 1" in capsys.readouterr().err
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
    assert main([*command, "--resume"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == result


def test_it_starts_from_weights(photos, tmp_path, capsys):
    """With a new head for other classes; a run that went on for no time keeps what it was given."""
    first, tuned = tmp_path / "first", tmp_path / "tuned"
    assert main(train_command(photos, first, "--epochs", "1")) == 0
    weights = first / "model.safetensors"
    options = ["--epochs", "1", "--learning-rate", "1e-12", "--checkpoint", str(weights)]
    assert main(train_command(photos, tuned, *options)) == 0
    before, after = load_file(weights), load_file(tuned / "model.safetensors")
    count = sum(not name.endswith("relative_position_index") for name in before)
    assert f"starts from {weights}: {count} tensors\n" in capsys.readouterr().out
    for name, value in before.items():
        torch.testing.assert_close(after[name], value)

    # the size is that of the run, where no other is asked for
    others = write_photos(tmp_path / "others", classes=("red", "green", "blue"))
    command = ["train", "--data", str(others), "--output", str(tmp_path / "other")]
    command += ["--workers", "0", "--batch-size", "8", *options]
    assert main(command) == 0
    line = f"{count - 2} tensors; head.weight, head.bias start anew, for 3 classes\n"
    assert line in capsys.readouterr().out
    after = load_file(tmp_path / "other" / "model.safetensors")
    assert after["head.weight"].shape == (3, 32)
    name = "layers.0.cpsa_blocks.0.attn.qkv.weight"
    torch.testing.assert_close(after[name], before[name])

    assert main([*command, "--resume"]) == 0
    assert "resumed after step 3 of 3" in capsys.readouterr().out
    assert main([*command, "--resume", "--checkpoint", str(WEIGHTS)]) == 2
    assert "checkpoint was" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"no checkpoint"])
def test_a_damaged_checkpoint_is_named(photos, tmp_path, capsys, damage):
    command = train_command(photos, tmp_path / "run", "--epochs", "1")
    assert main(command) == 0
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    assert main([*command, "--resume"]) == 2
    error = capsys.readouterr().err
    assert f"{checkpoint} is no checkpoint of a run: remove it to start again" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nowhere"), "--data must be 'digits' or a folder of images"),
        (("--epochs", "0"), "'0' is not a whole number from 1 to 1000000"),
        (("--backend", "cuda"), "invalid choice: 'cuda'"),
        (("--batch-size", "64"), "at most the 16 training images, got 64"),
        (("--output", "{photos}/dark/0.png"), "File exists"),
        (("--learning-rate", "0"), "learning_rate must be more than 0, got 0.0"),
        (("--drop-path", "1"), "drop_path_rate must be in [0, 1), got 1"),
        (("--checkpoint", "nowhere.pth"), "there is no checkpoint file nowhere.pth"),
        (("--checkpoint", str(WEIGHTS)), "is of images with 1 channels, these have 3"),
        (("--resume",), "there is no run in"),
        (("--workers", "-1"), "'-1' is not a whole number from 0 to 1024"),
    ],
)
def test_errors_are_one_line_and_exit_2(photos, tmp_path, capfd, arguments, message):
    arguments = [argument.format(photos=photos) for argument in arguments]
    try:
        status = main(train_command(photos, tmp_path / "run", *arguments))
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    errors = capfd.readouterr().err
    assert message in errors
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_named():
    output = run_python(
        """
        import sys
        sys.modules["tqdm"] = None
        from catkernels.__main__ import main
        sys.stderr = sys.stdout
        assert main(["train"]) == 2
        """
    )
    assert output.endswith("training needs tqdm: pip install 'catkernels[train]'\n")
