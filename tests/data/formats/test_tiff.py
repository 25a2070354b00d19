"""TIFF files as other programs write them, and damaged ones."""

import io
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pretrain.data.__main__ import main as data_command
from pretrain.data.formats.stored import DecodeError, SeveralPagesError
from pretrain.data.formats.tiff import read_tiff
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.reader import Reader
from pretrain.data.show import examine, save_sheet
from pretrain.data.views.decode import decode_file, decode_sample, stored_values
from pretrain.data.views.orientation import read_orientation
from pretrain.data.write.images import UnreadableImageError, prepare

BANDS = np.random.default_rng(0).integers(0, 4096, (40, 56, 13)).astype(np.uint16)
PHOTO = np.random.default_rng(1).integers(0, 256, (40, 56, 3)).astype(np.uint8)


def tiff(pixels: np.ndarray, **how: Any) -> bytes:
    out = io.BytesIO()
    several = {"planarconfig": "contig"} if pixels.ndim == 3 else {}
    tifffile.imwrite(out, pixels, **{"photometric": "minisblack", **several, **how})
    return out.getvalue()


def planes(pixels: np.ndarray, **how: Any) -> bytes:
    return tiff(np.ascontiguousarray(pixels.transpose(2, 0, 1)), planarconfig="separate", **how)


@pytest.mark.parametrize("layout", [{}, {"rowsperstrip": 7}, {"tile": (16, 32)}], ids=["one strip", "strips", "tiles"])
@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "packbits", "zstd"])
def test_every_layout_and_compression_keeps_every_value(layout, compression):
    for dtype in ("uint8", "uint16", "int16", "float32"):
        values = BANDS.astype(dtype) if dtype != "int16" else (BANDS.astype(np.int16) - 2000)
        for write in (tiff, planes):
            for more in ({}, {"bigtiff": True, "byteorder": ">"}, {"predictor": True} if compression else {}):
                found = read_tiff(write(values, compression=compression, **layout, **more))
                assert found.values.dtype == dtype and found.kind == f"{dtype} TIFF" and found.colours == 0
                np.testing.assert_array_equal(found.values, values)


def test_12_bits_are_read_packed_and_in_16():
    gray = BANDS[..., 0]
    for data in (tiff(gray), tiff(gray, bitspersample=12)):
        np.testing.assert_array_equal(read_tiff(data).values[..., 0], gray)
        pixels = decode_file(data, 1, value_range=(0, 4095))
        assert len(np.unique(pixels)) == len(np.unique(gray))


def test_colours_alpha_and_gray_follow_the_channels_that_are_asked_for():
    rgb = tiff(PHOTO, photometric="rgb")
    assert (decode_file(rgb, 3) == PHOTO).all()
    luma = np.asarray(Image.fromarray(PHOTO).convert("L")).astype(int)
    assert np.abs(decode_file(rgb, 1)[..., 0] - luma).max() <= 1
    rgba = tiff(np.dstack([PHOTO, PHOTO[..., :1]]), photometric="rgb", extrasamples=["unassalpha"])
    assert (decode_file(rgba, 3) == PHOTO).all() and decode_file(rgba, 4).shape == (40, 56, 4)
    infrared = tiff(np.dstack([PHOTO, PHOTO[..., :1]]), photometric="rgb", extrasamples=["unspecified"])
    assert decode_file(infrared, 4).shape == (40, 56, 4)
    with pytest.raises(DecodeError, match="4 channels, not in_chans=3"):
        decode_file(infrared, 3)
    gray = tiff(PHOTO[..., 0])
    assert (decode_file(gray, 3) == PHOTO[..., :1]).all()
    with pytest.raises(DecodeError, match="13 channels, not in_chans=3"):
        decode_file(tiff(BANDS), 3, value_range=(0, 4095))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_files_of_libtiff_are_the_pixels_of_pil(mode, compression):
    image = Image.fromarray(PHOTO).convert(mode)
    out = io.BytesIO()
    image.save(out, "TIFF", compression=compression)
    assert (decode_file(out.getvalue(), 3) == np.asarray(image.convert("RGB"))).all()


def test_jpeg_in_tiff_is_within_its_loss_and_white_zero_is_inverted():
    smooth = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)[..., None].repeat(3, 2)
    found = read_tiff(tiff(smooth, photometric="rgb", compression="jpeg", tile=(32, 32))).values
    assert np.abs(found.astype(int) - smooth).max() <= 4
    gray = BANDS[..., 0]
    np.testing.assert_array_equal(read_tiff(tiff(gray, photometric="miniswhite")).values[..., 0], 65535 - gray)


def test_floats_of_other_widths_become_float32():
    values = np.linspace(-2, 2, 40 * 56).reshape(40, 56)
    for dtype in (np.float16, np.float64):
        found = read_tiff(tiff(values.astype(dtype))).values
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found[..., 0], values.astype(dtype).astype(np.float32))


def test_pages_are_refused_or_become_channels_and_overviews_are_passed_over():
    stack = planes(BANDS)
    stacked = tiff(np.ascontiguousarray(BANDS.transpose(2, 0, 1))[..., None])
    with pytest.raises(SeveralPagesError, match="13 pages; `fovea data write --pages channels`"):
        read_tiff(stacked)
    np.testing.assert_array_equal(read_tiff(stacked, pages_are_channels=True).values, BANDS)
    assert (read_tiff(stack, pages_are_channels=True).values == BANDS).all()
    with pytest.raises(DecodeError, match="no channels of one image"):
        read_tiff(pyramid(thumbnail=0), pages_are_channels=True)
    np.testing.assert_array_equal(read_tiff(pyramid(thumbnail=1)).values, BANDS)


def pyramid(*, thumbnail: int) -> bytes:
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as file:
        file.write(BANDS, photometric="minisblack", planarconfig="contig")
        file.write(BANDS[::2, ::2], photometric="minisblack", planarconfig="contig", subfiletype=thumbnail)
    return out.getvalue()


def test_orientation_is_read_in_both_kinds_and_byte_orders():
    for more in ({}, {"bigtiff": True}, {"byteorder": ">"}, {"byteorder": ">", "bigtiff": True}):
        data = tiff(PHOTO, photometric="rgb", extratags=[(274, "H", 1, 6, True)], **more)
        assert read_orientation(data) == 6
        assert decode_file(data, 3).shape == (56, 40, 3) and decode_file(data, 3, "stored").shape == (40, 56, 3)
        assert (decode_file(data, 3) == np.rot90(PHOTO, -1)).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(BANDS), "data.range"),
        (tiff(BANDS.astype(np.uint32)), "uint32 per value; save it as float32"),
        (tiff(BANDS.astype(np.complex64)), "complex64 per value"),
        (tiff(PHOTO, photometric="rgb", compression="webp"), "compression WEBP is not read; save it with LZW"),
        (tiff(np.dstack([PHOTO, PHOTO[..., :1]]), photometric="separated"), "colours SEPARATED are not read"),
        (tiff(np.zeros((4, 16, 16, 1), np.uint8), volumetric=True, tile=(16, 16, 16)), "depth 4"),
    ],
)
def test_what_is_not_read_is_named_with_the_way_out(data, reason):
    with pytest.raises(DecodeError, match=reason):
        decode_file(data, 3)


def test_a_file_that_lacks_its_end_or_a_tile_is_damaged():
    for compression in (None, "lzw", "deflate"):
        data = tiff(BANDS, compression=compression)
        with pytest.raises(DecodeError, match="ends after the file"):
            read_tiff(data[: len(data) // 2])
    data = tiff(BANDS, tile=(32, 32))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        place = file.pages[0].tags[325].valueoffset  # type: ignore[union-attr]
    with pytest.raises(DecodeError, match="tile 1 is not in the file"):
        read_tiff(data[: place + 2] + bytes(2) + data[place + 4 :])  # 16-bit counts


def test_sizes_are_checked_before_anything_is_decoded():
    data = bytearray(tiff(np.zeros((64, 64), np.uint8), compression="deflate"))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        tags = {code: file.pages[0].tags[code].valueoffset for code in (256, 257)}  # type: ignore[union-attr]
    for code in tags:
        struct.pack_into("<H" if file.pages[0].tags[code].dtype == 3 else "<I", data, tags[code], 60_000)  # type: ignore[union-attr]
    tracemalloc.start()
    with pytest.raises(DecodeError, match="too large: 60000 x 60000 pixels"):
        read_tiff(bytes(data))
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    with pytest.raises(DecodeError, match=r"of 26 bytes, .*16 bytes for each pixel of data.max_pixels"):
        read_tiff(tiff(BANDS), 40 * 56)


def test_a_jpeg_larger_than_its_tile_is_never_decoded():
    import imagecodecs

    small = tiff(np.zeros((32, 32, 3), np.uint8), photometric="rgb", compression="jpeg", tile=(32, 32))
    bomb = imagecodecs.jpeg_encode(np.zeros((4000, 4000, 3), np.uint8))
    with tifffile.TiffFile(io.BytesIO(small)) as file:
        tags = file.pages[0].tags  # type: ignore[union-attr]
        places = tags[324].valueoffset, tags[325].valueoffset
    data = bytearray(small + bomb)
    struct.pack_into("<I", data, places[0], len(small))
    struct.pack_into("<I", data, places[1], len(bomb))
    with pytest.raises(DecodeError, match="a JPEG of 4000 x 4000 in 32 x 32 pixels"):
        read_tiff(bytes(data))


def test_a_header_alone_is_damaged():
    for data in (b"II*\0", b"II*\0\x08\0\0\0", b"II*\0damaged", b"MM\0+\0\x08\0\0" + bytes(8)):
        with pytest.raises(DecodeError, match="damaged TIFF"):
            read_tiff(data)


DAMAGED = [tiff(BANDS[:8, :8, :3], compression=how, tile=(16, 16)) for how in (None, "lzw", "deflate", "zstd")]
DAMAGED += [tiff(PHOTO[:16, :16], photometric="rgb", compression="jpeg"), tiff(PHOTO[..., 0], photometric="miniswhite")]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(DAMAGED), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6), st.floats(0, 1))
def test_damaged_bytes_give_pixels_or_a_decode_error(data, changes, kept):
    damaged = bytearray(data)
    for place, value in changes:
        damaged[int(place * (len(damaged) - 1))] = value
    damaged = damaged[: max(8, int(len(damaged) * (0.5 + kept)))]
    try:
        pixels = decode_file(bytes(damaged), 3, value_range=(0, 4095), max_pixels=100_000)
    except DecodeError as error:
        assert "\n" not in str(error) and str(error)
    else:
        assert pixels.ndim == 3 and pixels.shape[2] == 3 and np.isfinite(pixels).all()


def test_a_set_of_tiffs_is_written_shown_and_read_with_every_value(tmp_path: Path, capsys):
    (tmp_path / "scenes").mkdir()
    for number in range(3):
        (tmp_path / "scenes" / f"{number}.tif").write_bytes(tiff(BANDS + number, tile=(32, 32), compression="deflate"))
    stacked = tiff(np.ascontiguousarray(BANDS.transpose(2, 0, 1))[..., None])
    (tmp_path / "scenes" / "stack.TIFF").write_bytes(stacked)
    assert data_command(["write", str(tmp_path / "scenes"), str(tmp_path / "out"), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "skipped stack.TIFF: cannot be decoded: a TIFF of 13 pages" in said
    assert "3 of 3 images looked at are uint16 TIFF" in said and "data.range=[0, 8191]" in said
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.extensions == ("tif",)
    reader = Reader(dataset)
    for place in range(3):
        sample = reader.read(0, place)
        pixels = decode_sample(sample, 13, value_range=(0, 4097))
        expected = (BANDS + int(sample["__key__"])) * (255 / 4097)
        np.testing.assert_allclose(pixels, expected, atol=1e-4)
    statistics = examine(dataset, value_range=(0.0, 4097.0))
    assert statistics.modes == {"uint16 TIFF 13": 3} and not statistics.unreadable
    save_sheet(dataset, tmp_path / "sheet.png", value_range=(0.0, 4097.0))

    command = ["write", str(tmp_path / "scenes"), str(tmp_path / "all"), "--pages", "channels", "--size", "20"]
    assert data_command([*command, "--workers", "1"]) == 0
    dataset = Dataset.open(tmp_path / "all")
    assert dataset.extensions == ("npy",) and dataset.num_samples == 4


def test_resized_photos_become_png_and_small_ones_keep_their_bytes():
    data = tiff(PHOTO, photometric="rgb")
    assert prepare(data, size=None, quality=90) == prepare(data, size=40, quality=90) == ("tif", data)
    extension, smaller = prepare(data, size=20, quality=90)
    assert extension == "png" and decode_file(smaller, 3).shape == (20, 28, 3)
    with pytest.raises(UnreadableImageError, match="holds NaN"):
        prepare(tiff(np.full((4, 4), np.nan, np.float32)), size=None, quality=90)
    kind, values = stored_values(tiff(BANDS)) or ("", BANDS)
    assert kind == "uint16 TIFF" and values.shape == BANDS.shape
