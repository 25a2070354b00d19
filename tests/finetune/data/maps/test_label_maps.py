"""Class ids and depths out of PNGs: exact, or refused with the reason."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.data.maps.label_maps import Labels, decode_depth, decode_ids, decode_segment_ids
from finetune.predictions import Classes


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, form)
    return out.getvalue()


def ids(high: int = 255) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high + 1, (6, 9))


def test_gray_and_palette_pngs_give_ids_whatever_the_palette_colours():
    gray = Image.fromarray(ids().astype(np.uint8))
    assert (decode_ids(encoded(gray)) == ids()).all()
    palette = Image.fromarray(ids().astype(np.uint8), "P")
    palette.putpalette([7, 7, 7] * 256)
    assert (decode_ids(encoded(palette)) == ids()).all()


def test_16_bit_ids_are_not_truncated():
    assert (decode_ids(encoded(Image.fromarray(ids(40_000).astype(np.uint16)))) == ids(40_000)).all()


def test_one_bit_masks_are_0_and_1():
    assert (decode_ids(encoded(Image.fromarray(ids(1).astype(bool)))) == ids(1)).all()


def test_panoptic_segment_ids_combine_red_green_and_blue():
    colours = np.array([[[1, 2, 3], [0, 0, 0]]], np.uint8)
    assert decode_segment_ids(encoded(Image.fromarray(colours))).tolist() == [[1 + 2 * 256 + 3 * 65536, 0]]


def test_depth_is_in_metres_and_unknown_stays_0():
    stored = np.array([[0, 1500, 65535]], np.uint16)
    depth = decode_depth(encoded(Image.fromarray(stored)), 1000)
    assert depth.dtype == np.float32 and depth.tolist() == [[0, 1.5, pytest.approx(65.535)]]


def saved(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, values, allow_pickle=True)
    return out.getvalue()


def two_pages() -> bytes:
    out = io.BytesIO()
    page = Image.new("L", (4, 4))
    page.save(out, "TIFF", save_all=True, append_images=[page])
    return out.getvalue()


def test_gif_tiff_bmp_and_npy_hold_the_same_ids():
    values = ids(200).astype(np.uint8)
    gray, palette = Image.fromarray(values), Image.fromarray(values)
    palette.putpalette(list(np.random.default_rng(0).integers(0, 256, 768)))
    for image_format in ("TIFF", "BMP"):
        assert (decode_ids(encoded(gray, image_format)) == values).all(), image_format
        assert (decode_ids(encoded(palette, image_format)) == values).all(), image_format
    binary = Image.fromarray(ids(1).astype(np.uint8))
    binary.putpalette([0, 0, 0, 255, 255, 255])  # as in Carvana
    assert (decode_ids(encoded(binary, "GIF")) == ids(1)).all()
    first, second = Image.new("P", (3, 2), 1), Image.new("P", (3, 2), 0)
    first.putpalette([9, 9, 9, 200, 0, 0])
    animation = io.BytesIO()
    first.save(animation, "GIF", save_all=True, append_images=[second], optimize=False)
    assert decode_ids(animation.getvalue()).tolist() == [[1, 1, 1], [1, 1, 1]]
    many = ids(40_000)
    assert (decode_ids(encoded(Image.fromarray(many.astype(np.uint16)), "TIFF")) == many).all()
    assert (decode_ids(encoded(Image.fromarray(many.astype(np.float32)), "TIFF")) == many).all()
    for kind in ("uint8", "int64", "bool"):
        small = ids(1).astype(kind)
        assert (decode_ids(saved(small)) == small).all(), kind
        assert (decode_ids(saved(small[..., None])) == small).all(), kind


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded(Image.new("RGB", (4, 4))), "mode RGB: colours are not class ids"),
        (encoded(Image.new("L", (4, 4)), "JPEG"), "JPEG does not keep exact ids"),
        (encoded(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"), "no integers"),
        (saved(np.full((4, 4), -1)), "ids from -1 to -1"),
        (saved(np.zeros((4, 4), object)), "npy of object"),
        (saved(np.zeros((4, 4), np.int64))[:-3], "damaged npy"),
        (saved(np.zeros((4, 4, 3), np.uint8)), "a map has one channel"),
        (two_pages(), "several pages"),
        (encoded(Image.fromarray(ids().astype(np.uint8)))[:60], "damaged"),
        (b"", "not a PNG, GIF"),
        (b"GIF89a" + bytes(20), "damaged|not a PNG, GIF|0 x 0"),
    ],
)
def test_files_without_ids_are_refused(data: bytes, reason: str):
    with pytest.raises(ValueError, match=reason):
        decode_ids(data)


def test_depth_of_8_bits_is_refused():
    with pytest.raises(ValueError, match="mode L; expected a gray PNG of 16 bits"):
        decode_depth(encoded(Image.new("L", (4, 4))), 1000)


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, 60_000), min_size=1, max_size=200), st.data())
def test_ids_become_class_indices_or_void_or_an_error(known: set[int], data: st.DataObject):
    void = data.draw(st.sets(st.integers(0, 60_000).filter(lambda i: i not in known), max_size=3))
    classes = Classes([f"c{i}" for i in sorted(known)], sorted(known))
    labels = Labels(classes, void)
    drawn = data.draw(st.lists(st.sampled_from(sorted(known | void)), min_size=1, max_size=30))
    expected = [255 if i in void else sorted(known).index(i) for i in drawn]
    assert labels.of(np.array([drawn])).tolist() == [expected]
    other = data.draw(st.integers(0, 70_000).filter(lambda i: i not in known | void))
    with pytest.raises(ValueError, match=rf"neither a class nor void: {other} \(1 pixels\)"):
        labels.of(np.array([[*drawn, other]]))


def test_a_negative_id_is_refused():
    with pytest.raises(ValueError, match="class id -1 is negative"):
        Labels(Classes(["void", "wall"], [-1, 0]), {255})


def test_an_id_cannot_be_both_a_class_and_void():
    with pytest.raises(ValueError, match="id 0 of class 'wall' is also void"):
        Labels(Classes(["wall"], [0]), {0, 255})
