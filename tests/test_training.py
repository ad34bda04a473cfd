"""Training: what it learns from, that it can be stopped anywhere, and that it can be divided."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from fresh_process import ROOT
from PIL import Image
from torch.utils.data import TensorDataset

import catkernels
from catkernels.__main__ import main
from catkernels.training.data import Augmentation, ImageData, digits_data, folder_data, warp
from catkernels.training.processes import Processes
from catkernels.training.recipe import Recipe, make_optimizer, make_schedule
from catkernels.training.run_folder import write_atomically
from catkernels.training.trainer import Trainer

RECIPE = Recipe(epochs=3, batch_size=8, learning_rate=0.5)


def tiny_model(**options) -> catkernels.CAT:
    torch.manual_seed(1)
    sizes = {"img_size": 8, "patch_emb_size": 1, "in_chans": 1, "num_classes": 3, "patch_size": 4}
    stages = {"embed_dim": 4, "depths": (1, 1), "num_heads": (1, 2), "ape": True}
    return catkernels.CAT(**(sizes | stages | options))


def tiny_data() -> ImageData:
    """Three classes that differ in which third of the image is bright."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(45) % 3
    images = torch.randn(45, 1, 8, 8, generator=generator)
    for image, label in zip(images, labels, strict=True):
        image[0, 3 * label : 3 * label + 2] += 3
    train, test = (TensorDataset(images[part], labels[part]) for part in (slice(36), slice(36, 45)))
    return ImageData(train, test, ("top", "middle", "bottom"), Augmentation(10, 0.1, 0.1, True))


def trained(trainer: Trainer, until_step: int | None = None) -> dict[str, torch.Tensor]:
    """The weights after so many steps, by default all."""
    for _ in trainer.run():
        if trainer.step == until_step:
            break
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_bit_equal(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def write_photos(folder: Path, count: int = 10, classes: tuple[str, ...] = ("dark", "light")):
    """Images of noise, lighter from class to class, in a folder for each class."""
    generator = np.random.default_rng(0)
    for index, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for image in range(count):
            pixels = generator.integers(0, 80, (12, 16, 3)) + 150 * index
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{image}.png")
    return folder


@pytest.fixture
def photos(tmp_path) -> Path:
    return write_photos(tmp_path / "photos")


class TestData:
    def test_of_each_digit_a_fifth_is_held_out(self):
        data = digits_data(16)
        (train_images, train), (test_images, test) = data.train.tensors, data.test.tensors
        assert (len(train), len(test)) == (1437, 360)
        assert train_images.shape[1:] == test_images.shape[1:] == (1, 16, 16)
        assert train_images.min() == -1
        assert train_images.max() == 1
        counts = torch.stack([train.bincount(), test.bincount()]).double()
        assert (counts[1] / counts.sum(0) - 0.2).abs().max() < 0.005
        everything = torch.cat([train_images, test_images]).flatten(1)
        assert len(everything.unique(dim=0)) == 1797

    def test_a_folder_has_a_folder_for_each_class(self, photos):
        data = folder_data(photos, 8, Processes(), strict=True)
        assert data.classes == ("dark", "light")
        assert (len(data.train), len(data.test)) == (16, 4)
        assert sorted(label for _, label in data.test.files) == [0, 0, 1, 1]
        assert not set(data.train.files) & set(data.test.files)
        (dark, dark_label), (light, light_label) = data.train[0], data.train[-1]
        assert (dark_label, light_label) == (0, 1)
        assert dark.shape == (3, 8, 8)
        assert light.mean() > dark.mean() + 2

    @pytest.mark.parametrize("name", ["test", "val"])
    def test_test_images_may_have_a_folder_of_their_own(self, tmp_path, name):
        write_photos(tmp_path / "train")
        write_photos(tmp_path / name, count=3)
        data = folder_data(tmp_path, 8, Processes(), strict=True)
        assert (len(data.train), len(data.test)) == (20, 6)
        assert all(path.parent.parent.name == name for path, _ in data.test.files)

    def test_what_cannot_be_read_is_left_out_or_fatal(self, photos):
        whole = (photos / "dark" / "0.png").read_bytes()
        (photos / "dark" / "0.png").write_bytes(whole[: len(whole) // 2])
        (photos / "light" / "3.png").write_text("no image")
        (photos / "light" / "notes.txt").write_text("passed over")
        data = folder_data(photos, 8, Processes(), strict=False)
        assert len(data.train) + len(data.test) == 18
        assert len(data.unreadable) == 2
        assert "0.png: image file is truncated" in data.unreadable[0]
        assert "3.png: cannot identify image file" in data.unreadable[1]
        with pytest.raises(ValueError, match=r"truncated.*leave out --strict"):
            folder_data(photos, 8, Processes(), strict=True)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda folder: None, "or a folder of images, there is no"),
            (
                lambda folder: write_photos(folder, classes=("cat",)),
                "at least two classes, it has 1",
            ),
            (lambda folder: write_photos(folder, count=4), "at least 5 readable images, it has 4"),
            (lambda folder: write_photos(folder / "train", count=0), "images, it has 0"),
            (
                lambda folder: (
                    write_photos(folder / "train"),
                    write_photos(folder / "val", classes=("dark", "pale")),
                ),
                "the classes dark, light and .*val dark, pale",
            ),
        ],
        ids=["missing", "one class", "few images", "no images", "other classes"],
    )
    def test_a_bad_folder_is_explained(self, tmp_path, make, message):
        make(tmp_path / "data")
        with pytest.raises(ValueError, match=message):
            folder_data(tmp_path / "data", 8, Processes(), strict=False)

    def test_augmentation_moves_turns_scales_and_mirrors(self):
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(16, 2, 8, 8)
        unchanged = warp(images, Augmentation().draw(16, generator))
        torch.testing.assert_close(unchanged, images)
        mirrored = warp(images, Augmentation(flip=True).draw(16, generator))
        is_mirrored = torch.tensor(
            [
                torch.allclose(m, i.flip(-1), atol=1e-5)
                for m, i in zip(mirrored, images, strict=True)
            ]
        )
        torch.testing.assert_close(mirrored[~is_mirrored], images[~is_mirrored])
        assert 0 < is_mirrored.sum() < 16
        maps = Augmentation(degrees=30, zoom=0.2, shift=0.1).draw(1000, generator)
        scales = maps[:, :, :2].det().sqrt()
        angles = torch.rad2deg(torch.atan2(maps[:, 1, 0], maps[:, 0, 0]))
        for values, low, high in (
            (scales, 0.8, 1.2),
            (angles, -30, 30),
            (maps[:, :, 2], -0.2, 0.2),
        ):
            margin = (high - low) / 100
            assert low <= values.min() < low + margin
            assert high - margin < values.max() <= high


class TestRecipe:
    def test_only_weight_matrices_decay(self):
        model = tiny_model()
        decayed, spared = make_optimizer(model, RECIPE).param_groups
        assert decayed["weight_decay"] == 0.05
        assert spared["weight_decay"] == 0
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        decayed_names = {names.pop(id(parameter)) for parameter in decayed["params"]}
        assert decayed_names >= {"head.weight", "layers.0.cpsa_blocks.0.attn.qkv.weight"}
        assert all(name.endswith("weight") for name in decayed_names)
        assert not any("norm" in name for name in decayed_names)
        assert {names[id(parameter)] for parameter in spared["params"]} == set(names.values())
        assert {"ape", "head.bias"} <= set(names.values())
        assert any("relative_position_bias_table" in name for name in names.values())

    def test_the_learning_rate_rises_and_falls(self):
        recipe = replace(RECIPE, batch_size=256, learning_rate=1.0, warmup=0.25)
        optimizer = make_optimizer(tiny_model(), recipe)
        schedule = make_schedule(optimizer, recipe, steps=40)
        rates = []
        for _ in range(40):
            rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        assert rates[0] == pytest.approx(0.5 / 1000)
        assert max(rates) == rates[10] == pytest.approx(0.5)
        assert rates[25] == pytest.approx((0.5 + 0.005) / 2)
        assert schedule.get_last_lr()[0] == pytest.approx(0.005)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"epochs": 0}, "epochs must be more than 0, got 0"),
            ({"learning_rate": -1.0}, "learning_rate must be more than 0, got -1.0"),
            ({"learning_rate": float("nan")}, "learning_rate must be more than 0, got nan"),
            ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
            ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16, got 'fp8'"),
            ({"seed": -1}, "seed must be at least 0, got -1"),
        ],
    )
    def test_senseless_values_are_refused(self, values, message):
        with pytest.raises(ValueError, match=message):
            Recipe(**values)


class TestTrainer:
    def test_it_learns(self):
        trainer = Trainer(tiny_model(), tiny_data(), replace(RECIPE, epochs=30))
        trained(trainer)
        assert [epoch.epoch for epoch in trainer.epochs] == list(range(1, 31))
        assert trainer.epochs[-1].test_accuracy == 1
        assert trainer.epochs[-1].train_loss == pytest.approx(trainer.losses[-4:].mean().item())
        assert trainer.evaluate() == (
            trainer.epochs[-1].test_loss,
            trainer.epochs[-1].test_accuracy,
        )

    @pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
    @pytest.mark.parametrize("stop", [1, 4, 6], ids=lambda step: f"after-step-{step}-of-12")
    def test_stopped_anywhere_it_resumes_exactly(self, stop, precision, tmp_path):
        recipe = replace(RECIPE, precision=precision)
        model_options = {"drop_path_rate": 0.3, "drop_rate": 0.1}
        whole = Trainer(tiny_model(**model_options), tiny_data(), recipe)
        expected = trained(whole)
        stopped = Trainer(tiny_model(**model_options), tiny_data(), recipe)
        trained(stopped, until_step=stop)
        torch.save(stopped.state_dict(), tmp_path / "state.pt")

        resumed = Trainer(tiny_model(**model_options), tiny_data(), recipe)
        resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert_bit_equal(trained(resumed), expected)
        assert torch.equal(resumed.losses, whole.losses)
        without_times = [
            [replace(epoch, seconds=0) for epoch in trainer.epochs] for trainer in (resumed, whole)
        ]
        assert without_times[0] == without_times[1]

    def test_every_draw_depends_on_the_seed(self):
        first, again, other = (
            trained(Trainer(tiny_model(), tiny_data(), replace(RECIPE, epochs=1, seed=seed)))
            for seed in (0, 0, 1)
        )
        assert_bit_equal(first, again)
        assert not torch.equal(first["head.weight"], other["head.weight"])

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_mixed_precision_computes_in_half_and_keeps_float32_weights(self, precision):
        computed = []
        losses = {}
        for name in ("fp32", precision):
            model = tiny_model()
            model.head.register_forward_hook(lambda *args: computed.append(args[2].dtype))
            trainer = Trainer(model, tiny_data(), replace(RECIPE, precision=name))
            weights = trained(trainer)
            losses[name] = trainer.losses
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        assert set(computed) == {torch.float32, half}
        assert weights["head.weight"].dtype == torch.float32
        assert not torch.equal(losses["fp32"], losses[precision])
        assert (losses["fp32"] - losses[precision]).abs().max() < 0.1

    def test_batches_that_cannot_be_are_explained(self):
        with pytest.raises(ValueError, match="at most the 36 training images, got 64"):
            Trainer(tiny_model(), tiny_data(), replace(RECIPE, batch_size=64))
        three = Processes(rank=0, count=3)
        with pytest.raises(ValueError, match="divisible by the 3 processes, got 8"):
            Trainer(tiny_model(), tiny_data(), RECIPE, three)

    def test_a_loss_that_is_lost_ends_the_run(self):
        trainer = Trainer(tiny_model(), tiny_data(), replace(RECIPE, learning_rate=1e30))
        with pytest.raises(ValueError, match=r"the loss became nan in epoch \d: train with a lea"):
            trained(trainer)


DIVIDED = """
import sys
import torch
from test_training import RECIPE, Trainer, tiny_data, tiny_model, trained
from catkernels.training.processes import joined_processes

with joined_processes() as processes:
    trainer = Trainer(tiny_model(drop_path_rate=0).double(), tiny_data(), RECIPE, processes)
    weights = trained(trainer)
    torch.save([weights, trainer.losses, trainer.evaluate()], f"{sys.argv[1]}/{processes.rank}.pt")
"""


def torchrun(processes: int, *arguments: str) -> str:
    """What a program prints that ``torchrun`` starts in several processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    result = subprocess.run(
        [*command, f"--nproc-per-node={processes}", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_two_processes_give_the_weights_of_one_with_the_joined_batch(tmp_path):
    (tmp_path / "divided.py").write_text(DIVIDED)
    torchrun(2, str(tmp_path / "divided.py"), str(tmp_path))
    alone = Trainer(tiny_model(drop_path_rate=0).double(), tiny_data(), RECIPE)
    expected = trained(alone)
    for rank in range(2):
        weights, losses, evaluation = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(weights, expected)
        torch.testing.assert_close(losses, alone.losses)
        assert evaluation == pytest.approx(alone.evaluate())


class TestCommand:
    SMALL = ("--model", "digits", "--size", "8", "--batch-size", "8", "--workers", "0")

    def command(self, photos: Path, output: Path, *more: str) -> list[str]:
        return ["train", "--data", str(photos), "--output", str(output), *self.SMALL, *more]

    def test_a_run_leaves_weights_metrics_and_a_curve(self, photos, tmp_path, capsys):
        (photos / "dark" / "0.png").write_text("no image")
        output = tmp_path / "run"
        assert main(self.command(photos, output, "--epochs", "3")) == 0
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

    def test_killed_it_resumes_to_the_very_same_weights(self, photos, tmp_path, capsys):
        whole, killed = tmp_path / "whole", tmp_path / "killed"
        epochs = ("--epochs", "20")
        assert main(self.command(photos, whole, *epochs)) == 0

        process = subprocess.Popen(
            [sys.executable, "-m", "catkernels", *self.command(photos, killed, *epochs)],
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
        assert main(self.command(photos, killed, *epochs, "--resume")) == 0
        assert "resumed after step" in capsys.readouterr().out
        weights = [(run / "model.safetensors").read_bytes() for run in (whole, killed)]
        assert weights[0] == weights[1]

    def test_a_finished_run_is_kept(self, photos, tmp_path, capsys):
        command = self.command(photos, tmp_path / "run", "--epochs", "1")
        assert main([*command, "--resume"]) == 0
        result = capsys.readouterr().out.splitlines()[-1]
        weights = (tmp_path / "run" / "model.safetensors").read_bytes()

        assert main(command) == 2
        assert "holds a run already: go on with it by --resume" in capsys.readouterr().err
        assert main([*command, "--resume", "--seed", "1"]) == 2
        assert "seed was 0 and is now 1" in capsys.readouterr().err
        assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
        assert main([*command, "--resume"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == result

    @pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"no checkpoint"])
    def test_a_damaged_checkpoint_is_named(self, photos, tmp_path, capsys, damage):
        command = self.command(photos, tmp_path / "run", "--epochs", "1")
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
            (("--epochs", "0"), "'0' is not a whole number of at least 1"),
            (("--backend", "cuda"), "invalid choice: 'cuda'"),
            (("--batch-size", "64"), "at most the 16 training images, got 64"),
            (("--output", "{photos}/dark/0.png"), "File exists"),
            (("--learning-rate", "0"), "learning_rate must be more than 0, got 0.0"),
            (("--drop-path", "1"), "drop_path must be in [0, 1), got 1"),
            (("--workers", "-1"), "'-1' is not a whole number of at least 0"),
        ],
    )
    def test_errors_are_one_line_and_exit_2(self, photos, tmp_path, capfd, arguments, message):
        arguments = [argument.format(photos=photos) for argument in arguments]
        try:
            status = main(self.command(photos, tmp_path / "run", *arguments))
        except SystemExit as stopped:
            status = stopped.code
        assert status == 2
        errors = capfd.readouterr().err
        assert message in errors
        assert len(errors.splitlines()) == 1
        assert not (tmp_path / "run").exists()

    def test_torchrun_divides_it_without_further_flags(self, photos, tmp_path):
        command = self.command(photos, tmp_path / "run", "--epochs", "2")
        output = torchrun(2, "-m", "catkernels", *command)
        assert "fp32 on cpu and 1 more" in output
        assert output.count("test accuracy") == 3
        assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    def fail(file) -> None:
        file.write(b"half")
        raise OSError("disk full")

    write_atomically(tmp_path / "file", lambda file: file.write(b"old"))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "file", fail)
    assert (tmp_path / "file").read_bytes() == b"old"
