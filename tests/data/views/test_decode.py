import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pretrain.data.formats.stored import DecodeError
from pretrain.data.views.decode import decode_image, decode_npy, decode_sample


def encoded(pixels: np.ndarray, image_format: str, mode: str | None = None, **options) -> bytes:
    image = Image.fromarray(pixels)
    out = io.BytesIO()
    (image.convert(mode) if mode else image).save(out, image_format, **options)
    return out.getvalue()


def saved(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def picture(height: int = 40, width: int = 56) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([4 * y + x, 255 - 3 * x, 128 + 60 * np.sin(x / 6 + y / 9)], -1).clip(0, 255).astype(np.uint8)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return start + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_a_jpeg_is_what_pil_decodes_to_one_step():
    data = encoded(picture(), "JPEG", quality=90)
    theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode_image(data, 3) - theirs).max() <= 1


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_lossless_formats_give_the_exact_pixels(image_format):
    assert (decode_image(encoded(picture(), image_format, lossless=True), 3) == picture()).all()


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_every_format_gives_the_requested_channels(image_format, in_chans):
    image = decode_image(encoded(picture(), image_format), in_chans)
    assert image.shape == (40, 56, in_chans)
    assert image.dtype == np.uint8
    if in_chans == 4:
        assert (image[..., 3] == 255).all()


@pytest.mark.parametrize(
    ("mode", "image_format"),
    [("L", "JPEG"), ("CMYK", "JPEG"), ("L", "PNG"), ("P", "PNG"), ("LA", "PNG"), ("1", "PNG"), ("RGBA", "WEBP")],
)
def test_other_colour_modes_become_rgb_as_pil_converts_them(mode, image_format):
    data = encoded(picture(), image_format, mode)
    theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode_image(data, 3) - theirs).max() <= 1


def test_sixteen_bits_are_shifted_down_to_eight():
    wide = (np.arange(40 * 56).reshape(40, 56) * 29).astype(np.uint16)
    image = decode_image(encoded(wide, "PNG"), 3)
    assert (image == (wide >> 8).astype(np.uint8)[..., None]).all()


def test_a_single_pixel_is_an_image():
    for image_format in ("JPEG", "PNG"):
        assert decode_image(encoded(np.full((1, 1, 3), 200, np.uint8), image_format), 3).shape == (1, 1, 3)


def harmless(data: bytes) -> dict[str, bytes]:
    """The JPEG with what decoders warn of though every pixel is right."""
    scan, frame = data.index(b"\xff\xda"), data.index(b"JFIF\0")
    parameters = scan + 5 + 2 * data[scan + 4]
    return {
        "stray bytes at the end": data[:-2] + b"\0\0\0" + data[-2:],
        "stray bytes before the scan": data[:scan] + b"\0\0\0" + data[scan:],
        "a JFIF version to come": data[: frame + 5] + b"\x02" + data[frame + 6 :],
        "parameters of a progressive scan": data[: parameters + 1] + b"\0" + data[parameters + 2 :],
    }


@pytest.mark.parametrize("kind", harmless(encoded(picture(), "JPEG")))
def test_harmless_jpeg_warnings_are_no_damage_and_hide_none(kind):
    data = encoded(picture(), "JPEG", quality=90)
    odd = harmless(data)[kind]
    assert (decode_image(odd, 3) == decode_image(data, 3)).all()
    if "end" not in kind:
        with pytest.raises(DecodeError):
            decode_image(odd[: len(odd) * 3 // 4], 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"this is a text, whatever its name says", "not a JPEG, PNG or WebP"),
        (b"\xff\xd8", "not a JPEG|JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "not a JPEG"),
        (b"GIF89a" + bytes(100), "not a JPEG"),
        (png_header(13_300, 13_300), "too large"),
        (png_header(9_400, 9_400), "too large: 9400 x 9400"),
        (png_header(20_000, 20_000), "too large"),
        (png_header(65_536, 1), "too large: 65536 x 1"),
        (png_header(100, 100), "damaged|truncated"),
    ],
)
def test_a_file_that_is_no_image_is_refused_with_the_reason(data, reason):
    with pytest.raises(DecodeError, match=reason):
        decode_image(data, 3)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("part", [0.2, 0.5, 0.9])
def test_a_truncated_image_is_an_error(image_format, part):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(noise, image_format)
    with pytest.raises(DecodeError):
        decode_image(data[: int(len(data) * part)], 3)


def test_a_jpeg_bomb_is_refused_by_its_header():
    data = bytearray(encoded(picture(), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 13_300, 13_300)
    with pytest.raises(DecodeError, match="too large: 13300 x 13300"):
        decode_image(bytes(data), 3)


valid = {fmt: encoded(picture(), fmt) for fmt in ("JPEG", "PNG", "WEBP")} | {"NPY": saved(picture())}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(valid)), st.data())
def test_damaged_bytes_give_an_image_or_a_reason_and_nothing_else(kind, data):
    blob = bytearray(valid[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    decode = decode_npy if kind == "NPY" else decode_image
    try:
        image = decode(bytes(blob), 3)
    except DecodeError:
        return
    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert image.shape[2] == 3


def test_a_png_whose_palette_follows_its_pixels_is_damaged():
    data = encoded(picture(), "PNG", mode="P", transparency=3)
    palette, pixels = data.index(b"PLTE") - 4, data.index(b"IDAT") - 4
    with pytest.raises(DecodeError, match="damaged image"):
        decode_image(data[:palette] + data[pixels:-12] + data[palette:pixels] + data[-12:], 3)


@pytest.mark.parametrize("kind", [b"()", b"('|u1',)", b"-" * 5000 + b"1"])
def test_an_npy_header_of_odd_python_is_no_array(kind):
    text = b"{'descr': " + kind + b", 'fortran_order': False, 'shape': (2, 2, 3)}"
    with pytest.raises(DecodeError, match=r"not a \.npy array"):
        decode_npy(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(12), 3)


def test_npy_holds_any_number_of_channels():
    array = np.random.default_rng(0).integers(0, 256, (20, 30, 13), dtype=np.uint8)
    assert (decode_npy(saved(array), 13) == array).all()
    assert (decode_npy(saved(array[..., 0]), 1) == array[..., :1]).all()


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((4, 4, 5), np.uint8), "expected uint8 .H, W, 3."),
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((4, 4), np.uint8), "expected uint8"),
        (np.asfortranarray(np.zeros((4, 4, 3), np.uint8)), "Fortran"),
        (np.zeros((0, 4, 3), np.uint8), "4 x 0"),
    ],
)
def test_npy_of_another_kind_is_refused(array, reason):
    with pytest.raises(DecodeError, match=reason):
        decode_npy(saved(array), 3)


def test_a_pickle_in_npy_is_never_loaded(tmp_path):
    class Canary:
        def __reduce__(self):
            return (tmp_path.joinpath("canary").touch, ())

    out = io.BytesIO()
    np.save(out, np.array([Canary()], dtype=object), allow_pickle=True)
    with pytest.raises(DecodeError, match="object"):
        decode_npy(out.getvalue(), 3)
    assert not (tmp_path / "canary").exists()


def test_an_npy_header_that_promises_more_than_the_file_holds_is_refused():
    data = saved(np.zeros((40, 40, 3), np.uint8)).replace(b"(40, 40, 3)", b"(990,40, 3)")
    with pytest.raises(DecodeError, match="4800 bytes"):
        decode_npy(data, 3)


def test_more_channels_than_an_image_has_need_npy():
    with pytest.raises(DecodeError, match=r"in_chans=5; use TIFF or \.npy"):
        decode_image(encoded(picture(), "PNG"), 5)


def test_the_error_for_a_sample_without_an_image_lists_image_extensions():
    with pytest.raises(DecodeError, match=r"no image member \(jpg, jpeg, webp, png, tif, tiff, dcm, npy\)"):
        decode_sample({"__key__": "a", "cls": b"1"}, 3)


def test_the_kind_of_image_is_read_from_its_bytes():
    assert (decode_sample({"jpg": encoded(picture(), "PNG")}, 3) == picture()).all()


def test_a_bomb_takes_no_memory():
    out = io.BytesIO()
    Image.new("1", (13_300, 13_300)).save(out, "PNG")
    tracemalloc.start()
    before = int(Path("/proc/self/statm").read_text().split()[1])
    with pytest.raises(DecodeError, match=r"too large: .*pixels"):
        decode_image(out.getvalue(), 3)
    grown = (int(Path("/proc/self/statm").read_text().split()[1]) - before) * 4096
    assert grown < 20e6
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_a_long_strip_is_an_image_like_others():
    strip = np.zeros((10, 20_000, 3), np.uint8)
    assert decode_image(encoded(strip, "PNG"), 3).shape == strip.shape
    assert decode_image(encoded(strip, "JPEG"), 3).shape == strip.shape


@pytest.mark.parametrize("data", [encoded(picture(), fmt) for fmt in ("JPEG", "PNG", "WEBP")] + [saved(picture())])
def test_the_limit_of_pixels_is_a_setting(data):
    pixels = picture().shape[0] * picture().shape[1]
    decode = decode_npy if data.startswith(b"\x93") else decode_image
    assert decode(data, 3, max_pixels=pixels).shape == picture().shape
    with pytest.raises(DecodeError, match=r"too large: .* \(data\.max_pixels, --max-pixels\)"):
        decode(data, 3, max_pixels=pixels - 1)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_a_jpeg_is_decoded_at_a_fraction_of_its_sides(mode, scale):
    height, width = 120, 203
    ramp = np.linspace(0, 255, width).astype(np.uint8)[None].repeat(height, 0)
    out = io.BytesIO()
    Image.fromarray(ramp).convert(mode).save(out, "JPEG", quality=95)
    small = decode_image(out.getvalue(), 3, scale=scale, max_pixels=height * width // scale**2 + 1)
    assert small.shape == (-(-height // scale), -(-width // scale), 3)
    whole = decode_image(out.getvalue(), 3)
    assert abs(small[:, :8].astype(float).mean() - whole[:, : 8 * scale].astype(float).mean()) < 4
