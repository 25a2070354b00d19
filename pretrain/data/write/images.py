"""Check that a file can become a sample: its header gives the size, then it is decoded once, completely.

Bytes are kept unless a resize is requested: gray, CMYK, 16-bit and 1x1 images are good samples. What
training could not decode (decode.py) is refused.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
from PIL import Image

from pretrain.core.images import MAX_PIXELS
from pretrain.data.formats.read import read_stored
from pretrain.data.formats.stored import DecodeError, SeveralPagesError, Stored, check_size
from pretrain.data.views.decode import decode_image, image_values, open_header, reduction
from pretrain.data.views.orientation import UPRIGHT, read_orientation, upright
from pretrain.data.views.values import ARRAY_TYPES, is_16_bit_png, png_size

# By the format that PIL finds.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}  # of PIL, by extension
_NPY = b"\x93NUMPY"

# What several pages of one file are.
Pages = Literal["refuse", "channels"]


class UnreadableImageError(ValueError):
    """Why a file cannot become a sample."""


def prepare(
    data: bytes, *, size: int | None, quality: int, max_pixels: int = MAX_PIXELS, pages: Pages = "refuse"
) -> tuple[str, bytes]:
    """(extension by content, bytes to store): `data` itself, or resized to a shorter side of `size` (Lanczos).

    An image that is not larger than `size` keeps its bytes. A resized one keeps its format (JPEG and WebP at `quality`,
    PNG at 8 or 16 bits) and is turned upright, because its EXIF orientation is lost; also a small one.
    A JPEG above `max_pixels` is decoded at a smaller scale where `size` allows it, see `reduction`. A resized TIFF, one
    whose `pages` are channels and a DICOM become a PNG if they are gray or RGB of 8 bits, else npy.
    UnreadableImageError has the reason why it cannot be used.
    """
    with refusals(data):
        if data.startswith(_NPY):
            return "npy", _prepare_array(data, size, max_pixels)
        return (
            _prepare_stored(data, size, max_pixels, pages)
            or _prepare_deep_colours(data, size, max_pixels)
            or _prepare_image(data, size, quality, max_pixels)
        )


@contextmanager
def refusals(data: bytes) -> Iterator[None]:
    """Every error of reading `data` as an `UnreadableImageError` with the reason."""
    if not data:
        raise UnreadableImageError("empty file")
    try:
        yield
    except UnreadableImageError:
        raise
    except DecodeError as error:
        if str(error).startswith("too large"):
            raise UnreadableImageError(str(error)) from error
        raise UnreadableImageError(f"cannot be decoded: {error}") from error
    except Exception as error:  # a decoder raises errors of any type on hostile bytes
        raise UnreadableImageError(f"cannot be decoded: {str(error) or type(error).__name__}") from error


def open_image(data: bytes, max_pixels: int = MAX_PIXELS, scale: int = 1) -> Image.Image:
    """A JPEG, PNG or WebP with only its header read. UnreadableImageError for another format, or one too large."""
    try:
        image = open_header(data)
        check_size(*image.size, max_pixels, scale)
    except Image.UnidentifiedImageError:
        raise UnreadableImageError("not a JPEG, PNG, WebP, TIFF, DICOM or npy file") from None
    except DecodeError as error:
        raise UnreadableImageError(str(error)) from None
    return image


def image_sides(data: bytes) -> tuple[int, int]:
    """(width, height) of a JPEG, PNG, WebP or TIFF as stored. UnreadableImageError: it is none, or too large."""
    try:
        stored = read_stored(data)
    except DecodeError as error:
        raise UnreadableImageError(str(error)) from None
    return open_image(data).size if stored is None else (stored.values.shape[1], stored.values.shape[0])


def open_array(data: bytes, max_pixels: int = MAX_PIXELS, types: Sequence[str] = ARRAY_TYPES) -> np.ndarray:
    """An npy image [H, W] or [H, W, C] of one of `types`; never a pickle."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise UnreadableImageError(f"npy format version {version} is not supported")
    shape, _, dtype = read(file)
    if str(dtype) not in types or len(shape) not in (2, 3) or 0 in shape:
        raise UnreadableImageError(f"npy of {dtype} {shape}; expected {' or '.join(types)} (H, W) or (H, W, C)")
    check_size(shape[1], shape[0], max_pixels)
    return np.load(io.BytesIO(data), allow_pickle=False)


def _prepare_image(data: bytes, size: int | None, quality: int, max_pixels: int) -> tuple[str, bytes]:
    scale = 1 if size is None else reduction(data, size, max_pixels)
    image = open_image(data, max_pixels, scale)
    assert image.format is not None
    extension = EXTENSIONS[image.format]
    if extension == "jpg":  # PIL accepts damaged pixels silently
        pixels = decode_image(data, 1 if image.mode == "L" else 3, "stored", max_pixels=max_pixels, scale=scale)
        image = Image.fromarray(pixels[..., 0] if image.mode == "L" else pixels)
    else:
        image.load()
    orientation = read_orientation(data)
    if size is None or (scale == 1 and min(image.size) <= size and orientation == UPRIGHT):
        return extension, data
    image = _resize(image, size, orientation)
    out = io.BytesIO()
    image.save(out, FORMATS[extension], **({} if extension == "png" else {"quality": quality}))
    return extension, out.getvalue()


def _resize(image: Image.Image, size: int, orientation: int) -> Image.Image:
    if image.mode == "1":
        image = image.convert("L")
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA" if "transparency" in image.info or image.mode == "PA" else "RGB")
    if orientation != UPRIGHT:
        stored, image = image, Image.fromarray(upright(np.asarray(image), orientation))
        image.info |= stored.info
    image.info.pop("exif", None)  # some versions of Pillow write it again
    target = _target(*image.size, size)
    if image.mode in ("I;16", "I;16B", "I"):
        wide = Image.fromarray(np.asarray(image, dtype=np.float32)).resize(target, Image.Resampling.LANCZOS)
        return Image.fromarray(np.asarray(wide).round().clip(0, 65535).astype(np.uint16))
    return image.resize(target, Image.Resampling.LANCZOS)


def _prepare_array(data: bytes, size: int | None, max_pixels: int) -> bytes:
    array = open_array(data, max_pixels)
    check_finite(array)
    if array.flags.c_contiguous and (size is None or min(array.shape[:2]) <= size):
        return data
    return encoded(shrunk(array, size), "npy")  # Fortran order is not read for training


def _prepare_stored(data: bytes, size: int | None, max_pixels: int, pages: Pages) -> tuple[str, bytes] | None:
    """Of a file of `read_stored`; None for another."""
    stored, kept = read_pages(data, max_pixels, pages)
    if stored is None:
        return None
    orientation = read_orientation(data)
    small = size is None or min(stored.values.shape[:2]) <= size
    if kept and stored.extension and small and (size is None or orientation == UPRIGHT):
        return stored.extension, data
    values = upright(stored.values, orientation)
    values = shrunk(values, size)
    extension = extension_of(values, stored.colours)
    return extension, encoded(values, extension)


def _prepare_deep_colours(data: bytes, size: int | None, max_pixels: int) -> tuple[str, bytes] | None:
    """A PNG of colours in 16 bits that is to be smaller, as npy: PIL would keep 8 bits of it. None for another file."""
    if size is None or not is_16_bit_png(data) or min(png_size(data)) <= size:
        return None
    _, values = image_values(data, max_pixels)
    if values.shape[2] == 1:
        return None
    return "npy", encoded(_resize_array(upright(values, read_orientation(data)), size), "npy")


def read_pages(data: bytes, max_pixels: int, pages: Pages) -> tuple[Stored | None, bool]:
    """`read_stored`, and whether the file is one image as it is, not one of several pages."""
    try:
        stored, single = read_stored(data, max_pixels), True
    except SeveralPagesError:
        if pages == "refuse":
            raise
        stored, single = read_stored(data, max_pixels, pages_are_channels=True), False
    if stored is not None:
        check_finite(stored.values)
    return stored, single


def extension_of(values: np.ndarray, colours: int) -> str:
    """Of the member that keeps values [H, W, C]: png for gray and RGB of 8 bits, else npy."""
    return "png" if values.dtype == np.uint8 and values.shape[2] == colours else "npy"


def encoded(values: np.ndarray, extension: str, quality: int = 90) -> bytes:
    """Values [H, W, C] or [H, W] as a file: npy, png, jpg or webp of `quality`."""
    out = io.BytesIO()
    if extension == "npy":
        np.save(out, np.ascontiguousarray(values))
        return out.getvalue()
    image = Image.fromarray(np.ascontiguousarray(values[..., 0] if values.shape[2] == 1 else values))
    image.save(out, FORMATS[extension], **({} if extension == "png" else {"quality": quality}))
    return out.getvalue()


def shrunk(values: np.ndarray, size: int | None) -> np.ndarray:
    """Values [H, W] or [H, W, C] at a shorter side of `size` (Lanczos), if they are larger."""
    return values if size is None or min(values.shape[:2]) <= size else _resize_array(values, size)


def check_finite(array: np.ndarray) -> None:
    """Refuse NaN."""
    if array.dtype == np.float32 and np.isnan(array).any():
        raise UnreadableImageError("holds NaN")


def _resize_array(array: np.ndarray, size: int) -> np.ndarray:
    target = _target(array.shape[1], array.shape[0], size)
    channels = array.reshape(*array.shape[:2], -1).transpose(2, 0, 1)
    resized = [_resize_channel(channel, target) for channel in channels]
    return np.stack(resized, axis=-1).reshape(target[1], target[0], *array.shape[2:])


def _resize_channel(values: np.ndarray, target: tuple[int, int]) -> np.ndarray:
    """Values [H, W] at (width, height) `target`; Lanczos overshoots, so integers are clipped to their type."""
    if values.dtype == np.uint8:
        return np.asarray(Image.fromarray(values).resize(target, Image.Resampling.LANCZOS))
    resized = np.asarray(Image.fromarray(values.astype(np.float32)).resize(target, Image.Resampling.LANCZOS))
    if values.dtype == np.float32:
        return resized
    limits = np.iinfo(values.dtype)
    return resized.round().clip(limits.min, limits.max).astype(values.dtype)


def _target(width: int, height: int, size: int) -> tuple[int, int]:
    scale = size / min(width, height)
    if scale >= 1:
        return width, height
    return max(1, round(width * scale)), max(1, round(height * scale))
