"""A photo is seen as a viewer shows it, and what its tag holds never raises."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pretrain.data.views.decode import decode_image, decode_sample
from pretrain.data.views.orientation import read_orientation, recorded_orientation, upright
from tests.data.photos import ramps, stored
from tests.data.views.test_decode import encoded

FORMATS = ["JPEG", "PNG", "WEBP"]


def tiff(*entries: bytes, order: str = ">") -> bytes:
    """An EXIF block of directory entries, 12 bytes each."""
    start = (b"MM\0*" if order == ">" else b"II*\0") + struct.pack(f"{order}IH", 8, len(entries))
    return start + b"".join(entries) + bytes(4)


def entry(value: int, *, kind: int = 3, number: int = 1, order: str = ">") -> bytes:
    packed = struct.pack(order + {1: "B", 3: "H", 4: "I", 2: "H"}[kind], value)
    return struct.pack(f"{order}HHI", 0x0112, kind, number) + packed.ljust(4, b"\0")


def jpeg(exif: bytes) -> bytes:
    """A JPEG whose first segment holds `exif`."""
    plain = encoded(ramps(6, 9), "JPEG")
    body = b"Exif\0\0" + exif
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + plain[2:]


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_are_turned_as_a_viewer_turns_them(image_format, orientation):
    shown = ramps(24, 40)
    data = stored(shown, orientation, image_format)
    image = Image.open(io.BytesIO(data))
    theirs, pixels = ImageOps.exif_transpose(image).convert("RGB"), decode_image(data, 3)
    assert pixels.shape == shown.shape and pixels.flags.c_contiguous
    tolerance = 1 if image_format == "JPEG" else 0
    assert np.abs(pixels.astype(int) - np.asarray(theirs)).max() <= tolerance
    as_stored = decode_image(data, 3, "stored")
    assert np.abs(as_stored.astype(int) - np.asarray(image.convert("RGB"))).max() <= tolerance
    assert (decode_sample({"jpg": data}, 3, "stored") == as_stored).all()
    assert (decode_sample({"jpg": data}, 3) == pixels).all()


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_file_without_the_tag_keeps_its_pixels(image_format):
    data = encoded(ramps(24, 40), image_format)
    assert read_orientation(data) == 1
    assert (decode_image(data, 3) == decode_image(data, 3, "stored")).all()


@pytest.mark.parametrize(
    ("exif", "orientation"),
    [
        (tiff(entry(6)), 6),
        (tiff(entry(8, order="<"), order="<"), 8),
        (tiff(entry(3, kind=4)), 3),
        (tiff(struct.pack(">HHII", 0x010F, 2, 9, 1 << 31), entry(5)), 5),  # the maker's name lies outside the file
        (tiff(entry(0)), 1),
        (tiff(entry(9)), 1),
        (tiff(entry(6, number=3)), 1),
        (tiff(entry(6, kind=2)), 1),
        (tiff(), 1),
        (b"", 1),
        (b"II*\0\xff\xff\xff\xff", 1),
        (b"MM\0*" + struct.pack(">IH", 8, 65535) + bytes(30), 1),
        (b"not a TIFF header", 1),
    ],
)
def test_the_tag_is_read_where_it_is_whole_and_else_is_1(exif, orientation):
    assert read_orientation(jpeg(exif)) == orientation
    assert decode_image(jpeg(exif), 3).shape[:2] == ((9, 6) if orientation > 4 else (6, 9))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), image_format=st.sampled_from(FORMATS))
def test_damaged_or_cut_files_never_raise(data, image_format):
    blob = bytearray(stored(ramps(6, 9), 6, image_format))
    for _ in range(data.draw(st.integers(0, 4))):
        blob[data.draw(st.integers(0, min(200, len(blob)) - 1))] = data.draw(st.integers(0, 255))
    assert read_orientation(bytes(blob[: data.draw(st.integers(0, len(blob)))])) in range(1, 9)


def test_arrays_of_any_shape_are_turned_and_orientation_1_copies_nothing():
    values = np.arange(12, dtype=np.uint16).reshape(3, 4)
    assert upright(values, 1) is values
    assert (upright(values, 6) == np.rot90(values, -1)).all()
    assert (upright(values, 8) == np.rot90(values)).all()


def test_records_that_do_not_say_it_ignored_the_tag():
    assert recorded_orientation({}) == "stored"
    assert recorded_orientation({"orientation": "exif"}) == "exif"
    with pytest.raises(ValueError, match="orientation 'mirrored' in the record"):
        recorded_orientation({"orientation": "mirrored"})
