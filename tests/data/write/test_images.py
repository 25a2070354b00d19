from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from pretrain.data.views.decode import decode_npy
from pretrain.data.write.images import UnreadableImageError, prepare
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


def test_a_rotated_photo_is_upright_after_a_resize_and_untouched_without():
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.new("RGB", (90, 60)).save(file, "JPEG", exif=exif)
    assert prepare(file.getvalue(), size=None, quality=90)[1] == file.getvalue()
    for size, expected in ((30, (30, 45)), (500, (60, 90))):
        assert Image.open(io.BytesIO(prepare(file.getvalue(), size=size, quality=90)[1])).size == expected


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
