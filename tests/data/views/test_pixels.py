"""An image is the same pixels as an array, a PIL image, a tensor or a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.data.views.pixels import to_images, to_pixels
from tests.data.photos import stored

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
TENSOR = torch.from_numpy(PIXELS).permute(2, 0, 1)


@pytest.mark.parametrize("image", [PIXELS, Image.fromarray(PIXELS), TENSOR, TENSOR / 255], ids=lambda i: type(i))
def test_every_kind_of_image_gives_the_same_pixels(image):
    assert np.array_equal(to_pixels(image, 3), PIXELS)


def test_files_are_decoded(tmp_path: Path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", PIXELS)
    for name in ("a.png", "a.npy"):
        assert np.array_equal(to_pixels(tmp_path / name, 3), PIXELS)
        assert np.array_equal(to_pixels(str(tmp_path / name), 3), PIXELS)


@pytest.mark.parametrize("images", [np.stack([PIXELS] * 2), torch.stack([TENSOR] * 2), [PIXELS, TENSOR]])
def test_a_batch_and_a_list_are_many_images_and_an_image_is_one(images):
    assert [image.shape for image in to_images(images, 3)] == [(6, 5, 3)] * 2
    assert [image.shape for image in to_images(images[0], 3)] == [(6, 5, 3)]


def test_a_file_stands_upright_unless_its_stored_pixels_are_asked_for(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(stored(PIXELS, 6, "PNG"))
    assert np.array_equal(to_pixels(tmp_path / "a.png", 3), PIXELS)
    assert to_images([tmp_path / "a.png"], 3, "stored")[0].shape == (5, 6, 3)


def test_channels_follow_the_backbone():
    assert to_pixels(PIXELS[..., 0], 1).shape == (6, 5, 1)
    assert to_pixels(Image.fromarray(PIXELS), 1).shape == (6, 5, 1)
    assert to_pixels(np.zeros((6, 5, 7), np.uint8), 7).shape == (6, 5, 7)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (PIXELS.astype(np.float32), r"uint8 with 3 channels, got float32 \(6, 5, 3\)"),
        (PIXELS[..., :2], r"got uint8 \(6, 5, 2\)"),
        (PIXELS[:0], r"got uint8 \(0, 5, 3\)"),
        (TENSOR / 255 - 0.5, "within .0, 1., not normalized"),
        (TENSOR / 0.0, "within .0, 1., not normalized"),
    ],
)
def test_a_file_that_is_not_an_image_is_refused(image, message: str):
    with pytest.raises(ValueError, match=message):
        to_pixels(image, 3)


def test_a_pil_image_has_no_five_channels():
    with pytest.raises(ValueError, match="1, 3 or 4 channels, not 5"):
        to_pixels(Image.fromarray(PIXELS), 5)
