"""``python -m catkernels predict``, as a user types it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import SMALL, write_corrupt_dds, write_photos

from catkernels.__main__ import main
from catkernels.cat import CAT
from catkernels.commands.models import MODELS
from catkernels.digits import WEIGHTS
from catkernels.training.data import digits_data
from catkernels.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Ten images of noise in each of the folders dark and light."""
    return write_photos(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory) -> Path:
    """What a run of training wrote that learned to tell them."""
    run = tmp_path_factory.mktemp("run")
    options = ["--data", str(photos), "--epochs", "6", "--learning-rate", "0.1", *SMALL]
    assert main(["train", *options, "--output", str(run)]) == 0
    return run / "model.safetensors"


def predict(capsys, *arguments: object) -> list[str]:
    """The lines that it prints."""
    capsys.readouterr()
    assert main(["predict", *map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_folder_of_photos_with_what_a_run_wrote(trained, photos, capsys):
    (photos / "notes.txt").write_text("passed over")
    lines = predict(capsys, "--checkpoint", trained, photos)
    assert len(lines) == 20
    for line in lines:
        path, answer = line.split(": ")
        name, probability = answer.split(", ")[0].split(" (")
        assert name == Path(path).parent.name
        assert 50 < float(probability.split(" %")[0]) < 100


def test_the_numbers_are_the_models_own(trained, photos, capsys, tmp_path):
    """Whatever else is classified with a photo, and at another size as well."""
    photo = photos / "dark" / "0.png"
    (alone,) = predict(capsys, "--checkpoint", trained, photo)
    assert alone in predict(capsys, "--checkpoint", trained, photos)
    # from dark to light, so that something hangs on the size
    shaded = tmp_path / "shaded.png"
    Image.linear_gradient("L").convert("RGB").save(shaded)
    sizes = ([], ["--size", "24"], ["--size", "40"])
    answers = {predict(capsys, "--checkpoint", trained, shaded, *size)[0] for size in sizes}
    assert len(answers) > 1
    (best,) = predict(capsys, "--checkpoint", trained, photo, "--top", "1")
    assert alone.startswith(best + ", ")


def test_digits_are_read_as_dark_ink_on_light_paper(tmp_path, capsys):
    images, labels = digits_data().test[:40]
    for index, image in enumerate(images):
        pixels = ((1 - image[0]) * 127.5).round().byte().numpy()
        # photos are in colour, and of any size
        Image.fromarray(pixels).convert("RGB").resize((48, 48)).save(tmp_path / f"{index:02}.png")
    lines = predict(capsys, "--checkpoint", WEIGHTS, "--top", "1", tmp_path)
    told = [int(line.split(": ")[1].split(" ")[0]) for line in lines]
    assert (torch.tensor(told) == labels).double().mean() > 0.9


def test_weights_that_do_not_name_their_classes(photos, tmp_path, capsys):
    model = CAT(**(MODELS["digits"] | {"num_classes": 4, "in_chans": 3}))
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    options = ("--checkpoint", tmp_path / "weights.pth", photos / "dark" / "0.png")
    (line,) = predict(capsys, *options, "--top", "9")
    answers = line.split(": ")[1].split(", ")
    assert sorted(answer.split(" (")[0] for answer in answers) == [f"class {i}" for i in range(4)]


def test_what_cannot_be_read_is_named_beside_the_rest(trained, photos, tmp_path, capfd):
    (tmp_path / "0.png").write_text("no image")
    write_corrupt_dds(tmp_path / "corrupt.dds")
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "whole.png")
    assert main(["predict", "--checkpoint", str(trained), str(tmp_path)]) == 2
    output, errors = capfd.readouterr()
    assert output.startswith(f"{tmp_path / 'whole.png'}: ")
    *named, error = errors.splitlines()
    unidentified, unimplemented = named
    assert f"cannot identify image file '{tmp_path / '0.png'}'" in unidentified
    assert f"{tmp_path / 'corrupt.dds'}: Unimplemented pixel format" in unimplemented
    assert all(name.startswith("cannot read the image") for name in named)
    assert error == "python -m catkernels predict: 2 of 3 images cannot be read"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jpg"], "there is no image or folder nowhere.jpg"),
        (["{empty}"], "there are no images in the folder"),
        (["{text}"], "predict: cannot read the image"),
        (["{photo}", "--checkpoint", "nowhere.pth"], "there is no checkpoint file nowhere.pth"),
        (["{photo}", "--checkpoint", "{text}"], "is no checkpoint that torch.save wrote"),
        (["{photo}", "--checkpoint", "{other}"], "is of none of the models digits, cat_tiny"),
        (["{photo}", "--checkpoint", "{run}"], "model.safetensors, once the run has ended: name"),
        (["{photo}", "--checkpoint", "{backbone}"], "it holds no head to classify with"),
        (["{photo}", "--checkpoint", "{small}"], "It was trained at another size, or built with"),
        (["{photo}", "--top", "0"], "'0' is not a whole number from 1 to 1000"),
        ([], "the following arguments are required: PHOTO"),
    ],
)
def test_errors_are_one_line_and_exit_2(trained, photos, tmp_path, capfd, arguments, message):
    (tmp_path / "empty").mkdir()
    RunFolder(tmp_path, {}, processes=1).save_checkpoint({})
    (tmp_path / "checkpoint.pt").rename(tmp_path / "run.pt")
    (tmp_path / "text.txt").write_text("neither an image nor weights")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    backbone = CAT(**(MODELS["digits"] | {"out_indices": (0, 1)}))
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    small = CAT(**(MODELS["digits"] | {"img_size": 4}))
    torch.save(small.state_dict(), tmp_path / "small.pth")
    names = ("empty", "text.txt", "run.pt", "other.pth", "backbone.pth", "small.pth")
    files = {name.split(".")[0]: tmp_path / name for name in names}
    arguments = [text.format(photo=photos / "dark" / "0.png", **files) for text in arguments]
    if "--checkpoint" not in arguments:
        arguments += ["--checkpoint", str(trained)]
    try:
        status = main(["predict", *arguments])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    output, errors = capfd.readouterr()
    assert output == ""
    assert message in errors
    assert len(errors.splitlines()) == 1
    assert "strict=False" not in errors


def test_a_missing_package_is_named(monkeypatch, capsys):
    for name in ("catkernels.commands.predict", "catkernels.images", "PIL.Image"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert main(["predict", "photo.jpg", "--checkpoint", "weights.pth"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m catkernels predict: reading images needs PIL")
    assert error.endswith(": pip install pillow\n")
