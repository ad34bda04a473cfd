"""Photographs as tensors, whatever a camera or a scanner makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import write_corrupt_dds

from catkernels.images import image_files, ink, normalised, read_photo


def test_deep_grey_images_are_scaled_not_clipped(tmp_path):
    pixels = np.linspace(1000, 60000, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    photo = np.asarray(read_photo(tmp_path / "deep.png", 32))
    assert photo.min() < 8
    assert photo.max() > 247
    assert 100 < photo.mean() < 155


def test_the_middle_square_upright(tmp_path):
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 100  # what is seen of it
    pixels[:2, 10:20] = 200
    turned = Image.Exif()
    turned[0x0112] = 3  # held upside down
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=turned)
    photo = np.asarray(read_photo(tmp_path / "photo.png", 10))
    assert (photo[:8] == 100).all()
    assert (photo[8:] == 200).all()


def test_normalised_and_ink():
    white, black = Image.new("RGB", (3, 2), "white"), Image.new("RGB", (3, 2), "black")
    assert normalised(white).shape == (3, 2, 3)
    red, _, blue = normalised(white)[:, 0, 0].tolist()
    assert (red, blue) == (pytest.approx((1 - 0.485) / 0.229), pytest.approx((1 - 0.406) / 0.225))
    assert torch.equal(ink(white), torch.full((1, 2, 3), -1.0))
    assert torch.equal(ink(black), torch.ones(1, 2, 3))


def test_the_images_of_a_folder(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("z.JPG", "b/a.png", "notes.txt"):
        (tmp_path / name).write_text("")
    assert image_files(tmp_path) == [tmp_path / "b" / "a.png", tmp_path / "z.JPG"]


def test_what_is_no_image_says_so(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"cannot read the image .*corrupt\.dds: Unimplemented"):
        read_photo(write_corrupt_dds(tmp_path / "corrupt.dds"), 8)
    with pytest.raises(ValueError, match=r"cannot read the image .*: Is a directory$"):
        read_photo(tmp_path, 8)
    # as Pillow's plugins meet numbers that a format does not have
    monkeypatch.setattr(Image, "open", lambda _: {}[101])
    with pytest.raises(ValueError, match=r"cannot read the image photo\.tif: it is damaged$"):
        read_photo("photo.tif", 8)
