from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from pretrain.data.views.decode import decode_image, decode_npy
from pretrain.data.views.orientation import read_orientation
from pretrain.data.write.images import UnreadableImageError, prepare
from tests.data.photos import ramps, stored
from tests.data.tars import image_bytes, png_header_only, saved


@pytest.mark.parametrize(
    ("data", "extension", "mode"),
    [
        (image_bytes(0, size=(90, 60)), "jpg", "RGB"),
        (image_bytes(0, size=(90, 60), mode="L"), "jpg", "L"),
        (image_bytes(0, size=(90, 60), mode="CMYK"), "jpg", "RGB"),
        (image_bytes(0, size=(90, 60), mode="RGBA", image_format="PNG"), "png", "RGBA"),
        (image_bytes(0, size=(90, 60), mode="I;16", image_format="PNG"), "png", "I;16"),
        (image_bytes(0, size=(90, 60), image_format="WEBP"), "webp", "RGB"),
    ],
)
def test_a_resize_keeps_the_format_and_the_aspect(data, extension, mode):
    found, small = prepare(data, size=20, quality=90)
    image = Image.open(io.BytesIO(small))
    assert (found, image.size, image.mode) == (extension, (30, 20), mode)
    assert prepare(data, size=60, quality=90) == (extension, data)


def test_a_resize_of_16_bits_and_of_arrays_keeps_their_range():
    ramp = np.tile(np.linspace(0, 65535, 80).astype(np.uint16), (60, 1))
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "PNG")
    small = np.asarray(Image.open(io.BytesIO(prepare(file.getvalue(), size=30, quality=90)[1])))
    assert small.shape == (30, 40)
    assert small.max() > 64000
    assert abs(small.astype(float).mean() - 32767) < 100
    cube = np.tile(np.arange(5, dtype=np.uint8) * 50, (60, 80, 1))
    array = np.load(io.BytesIO(prepare(saved(cube), size=30, quality=90)[1]))
    assert array.shape == (30, 40, 5)
    assert (array == np.arange(5) * 50).all()


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_upright_with_and_without_a_resize(image_format, orientation):
    shown = ramps(60, 90)
    data = stored(shown, orientation, image_format)
    assert prepare(data, size=None, quality=90)[1] == data
    for size, expected in ((30, (30, 45)), (500, (60, 90))):
        small = prepare(data, size=size, quality=95)[1]
        pixels = decode_image(small, 3)
        assert pixels.shape[:2] == expected
        assert (read_orientation(small) == 1) or small == data
        near = np.asarray(Image.fromarray(shown).resize(expected[::-1], Image.Resampling.LANCZOS)).astype(int)
        assert np.abs(pixels - near).max() < 12


def test_a_resize_keeps_the_transparency_and_colours_of_a_turned_palette_image():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(ramps(60, 90)).quantize(8)
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif, transparency=0)
    small = Image.open(io.BytesIO(prepare(file.getvalue(), size=500, quality=90)[1]))
    expected = np.rot90(np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("RGBA")), -1)
    assert small.mode == "RGBA" and (np.asarray(small) == expected).all()


def test_a_rotated_photo_whose_other_tags_are_wrong_is_upright_too():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Canon"
    file = io.BytesIO()
    Image.new("RGB", (90, 60)).save(file, "JPEG", exif=exif)
    wrong = file.getvalue().replace(b"\x01\x0f\x00\x02", b"\x01\x00\x00\x02")  # the maker as the picture's width
    assert wrong != file.getvalue()
    assert Image.open(io.BytesIO(prepare(wrong, size=30, quality=90)[1])).size == (30, 45)


@pytest.mark.parametrize("size", [None, 20])
def test_what_training_could_not_decode_does_not_become_a_sample(size):
    data = image_bytes(0, size=(90, 60))
    damaged = data[: len(data) // 3] + b"\xff\xd5" + data[len(data) // 3 + 2 :]
    Image.open(io.BytesIO(damaged)).load()  # PIL says nothing
    with pytest.raises(UnreadableImageError, match="cannot be decoded: JPEG: Corrupt"):
        prepare(damaged, size=size, quality=90)
    array = np.asfortranarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    assert (decode_npy(prepare(saved(array), size=None, quality=90)[1], 3) == array).all()


def test_a_bomb_is_refused_before_its_pixels_are_allocated():
    tracemalloc.start()
    for data in (png_header_only(13_300, 13_300), png_header_only(9_400, 9_400), png_header_only(20_000, 20_000)):
        with pytest.raises(UnreadableImageError, match="too large"):
            prepare(data, size=None, quality=90)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
