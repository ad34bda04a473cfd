"""Training: what it learns from, that it can be stopped anywhere, and that it can be divided."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_training import (
    RECIPE,
    tiny_data,
    tiny_model,
    trained,
    write_corrupt_dds,
    write_photos,
)

from catkernels.training.data import Augmentation, digits_data, folder_data, warp
from catkernels.training.processes import Processes
from catkernels.training.recipe import Recipe, make_optimizer, make_schedule
from catkernels.training.run_folder import write_atomically
from catkernels.training.trainer import Trainer


def assert_bit_equal(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


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
        write_corrupt_dds(photos / "light" / "corrupt.dds")
        data = folder_data(photos, 8, Processes(), strict=False)
        assert len(data.train) + len(data.test) == 18
        assert len(data.unreadable) == 3
        assert "0.png: image file is truncated" in data.unreadable[0]
        assert "3.png: cannot identify image file" in data.unreadable[1]
        assert "corrupt.dds: Unimplemented pixel format" in data.unreadable[2]
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
        three = Processes(count=3)
        with pytest.raises(ValueError, match="divisible by the 3 processes, got 8"):
            Trainer(tiny_model(), tiny_data(), RECIPE, three)

    def test_a_loss_that_is_lost_ends_the_run(self):
        trainer = Trainer(tiny_model(), tiny_data(), replace(RECIPE, learning_rate=1e30))
        with pytest.raises(ValueError, match=r"the loss became nan in epoch \d: train with a lea"):
            trained(trainer)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    def fail(file) -> None:
        file.write(b"half")
        raise OSError("disk full")

    write_atomically(tmp_path / "file", lambda file: file.write(b"old"))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "file", fail)
    assert (tmp_path / "file").read_bytes() == b"old"
