"""The model that ships: its weights, what it tells, and the maps of where it looks."""

from __future__ import annotations

import json
from dataclasses import asdict

import cpuinfo
import matplotlib.image
import pytest
import torch
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.torch import save_file

from catkernels.__main__ import main
from catkernels.cat import CAT
from catkernels.commands import digits_demo
from catkernels.commands.digits_demo import attention_weights, cpsa_map, ipsa_map
from catkernels.commands.train import DIGITS_RECIPE
from catkernels.digits import DIGITS, WEIGHTS, pretrained_digits
from catkernels.training.data import digits_data
from catkernels.training.run_folder import made_with


@pytest.fixture
def header() -> dict:
    """What the weights' file says about itself."""
    with safe_open(WEIGHTS, "pt") as file:
        return json.loads(file.metadata()["catkernels"])


def test_the_weights_are_small_and_tell_97_of_100_held_out_digits():
    assert WEIGHTS.stat().st_size <= 500_000
    images, labels = digits_data().test[:]
    with torch.inference_mode():
        right = pretrained_digits()(images).argmax(-1) == labels
    assert right.double().mean() >= 0.97


def test_the_weights_are_of_the_recipe_that_is_documented(header):
    options = header["options"]
    assert {name: options[name] for name in asdict(DIGITS_RECIPE)} == asdict(DIGITS_RECIPE)
    assert (options["data"], options["images"]) == ("digits", [1437, 360])


@pytest.mark.full
def test_the_documented_command_makes_the_weights_bit_for_bit(header, tmp_path):
    if header["made_with"] != made_with():
        pytest.skip(f"the weights were made with {header['made_with']}, this is {made_with()}")
    processor = cpuinfo.get_cpu_info()
    if processor["vendor_id_raw"] != "GenuineIntel":
        brand = processor["brand_raw"]
        pytest.skip(f"the weights were made on an Intel Xeon; {brand} adds in another order")
    assert main(["train", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS.read_bytes()


def test_demo_tells_digits_and_draws_where_it_looks(capsys, tmp_path):
    picture = tmp_path / "digits.png"
    assert main(["demo", "--model", "digits", "--save", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = [line.split()[:2] for line in lines[1:11]]
    assert [digit for digit, _ in told] == list("0123456789")
    assert sum(digit == answer for digit, answer in told) >= 9
    right, _, total, *_ = lines[11].split()
    assert int(right) / int(total) >= 0.97
    assert matplotlib.image.imread(picture).std() > 0.05


def test_the_picture_shows_the_surest_mistakes():
    images = torch.zeros(12, 1, 16, 16)
    numbers = torch.arange(12)
    answers = digits_demo.Answers(images, numbers % 10, numbers % 9, 1 - numbers / 20)
    figure = Figure()
    digits_demo._draw_mistakes(figure, answers, total=100)
    assert figure.get_suptitle() == "12 mistakes in 100 held-out digits, the 10 surest of them here"
    assert [axes.get_title() for axes in figure.axes] == [f"is a {label}" for label in range(10)]
    assert figure.axes[9].get_xlabel() == "told as 0\n(55 %)"
    figure = Figure()
    digits_demo._draw_mistakes(figure, answers[[3]], total=100)
    assert figure.get_suptitle() == "1 mistakes in 100 held-out digits"
    assert [axes.get_title() for axes in figure.axes] == ["is a 3"] + [""] * 9


@pytest.mark.parametrize("size", [10, 16])
def test_demo_of_weights_of_ones_own(size, capsys, tmp_path):
    """Also of a size that patches do not divide."""
    save_file(
        CAT(**(DIGITS | {"img_size": size})).state_dict(),
        tmp_path / "model.safetensors",
        {"catkernels": json.dumps({"options": {"model": "digits", "size": size}})},
    )
    files = ["--checkpoint", str(tmp_path / "model.safetensors"), "--save", str(tmp_path / "d.png")]
    assert main(["demo", *files]) == 0
    assert "of 360 held-out digits right" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "16"], "--image, --size and --batch are of photos"),
        (["--save", "digits.docx"], "the picture is a .png"),
        (["--checkpoint", "nowhere.pth"], "there is no checkpoint file"),
    ],
)
def test_demo_errors(arguments, message, capsys):
    assert main(["demo", "--model", "digits", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_attention_weights_are_those_of_the_very_forward_pass():
    model, images = pretrained_digits(), digits_data().test[:3][0]
    block = model.layers[0].cpsa_blocks[0]
    seen = []
    handle = block.attn.register_forward_hook(
        lambda _, inputs, output: seen.append((inputs, output))
    )
    weights = attention_weights(model, block, images)
    handle.remove()
    assert weights.shape == (3, 16, 16, 16)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 16, 16))
    ((inputs, output), _) = seen
    torch.testing.assert_close(block.attn(*inputs, return_attention=True), (output, weights))
    assert not block.attn._forward_pre_hooks


def test_ipsa_map_puts_each_pixel_of_each_window_in_its_place():
    weights = torch.zeros(1, 4, 2, 9, 9)  # 2 x 2 windows of 3 x 3 pixels, 2 heads
    weights[:, 1, :, :, 5] = 1  # all look at the second row's last pixel of the right window
    weights[:, 2, 0, :, 0] = 1  # one of two heads at the first pixel of the lower one
    expected = torch.zeros(6, 6)
    expected[1, 5] = 9
    expected[3, 0] = 4.5
    torch.testing.assert_close(ipsa_map(weights, 6, 6)[0], expected)
    even = torch.full((1, 4, 2, 9, 9), 1 / 9)
    torch.testing.assert_close(ipsa_map(even, 6, 6), torch.ones(1, 6, 6))


def test_cpsa_map_shows_what_one_patch_sees():
    weights = torch.zeros(2, 3, 4, 4)  # 3 channels, 2 x 2 patches
    weights[0, :, 1, 2] = 1  # the upper right patch sees the lower left one
    weights[1, 0, 3, 0] = 1
    seen = cpsa_map(weights, torch.tensor([1, 3]), 6, 6)
    expected = torch.zeros(2, 6, 6)
    expected[0, 3:, :3] = 4
    expected[1, :3, :3] = 4 / 3
    torch.testing.assert_close(seen, expected)
