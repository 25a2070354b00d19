"""Bytes of a sample to pixels: uint8 [height, width, channels], or a `DecodeError` with the reason. With a range of
values (`data.range`): float32 in the same unit, 0 to 255, without loss of bits.

The kind of image is read from its first bytes, never from its name. Photos are turned upright by their EXIF orientation
unless the caller asks for the stored pixels. Nothing is decoded before its size is known to be within the limits, a
truncated image is an error, and only JPEG, PNG, WebP, TIFF, DICOM and plain `.npy` arrays are ever parsed.
"""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Mapping, Sequence

import numpy as np
import simplejpeg
from numpy.lib import format as npy
from PIL import Image

from pretrain.core.images import MAX_PIXELS, Orientation, ValueRange
from pretrain.data.formats.read import holds_values, read_stored
from pretrain.data.formats.stored import DecodeError, Stored, check_size
from pretrain.data.shards.image_files import IMAGE_EXTENSIONS
from pretrain.data.views.orientation import read_orientation, upright
from pretrain.data.views.values import ARRAY_TYPES, is_16_bit_png, png_size, to_pixels_of_range

LABEL_EXTENSION = "cls"  # of the member that holds the number of a sample's class

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_LUMA = np.array([[0.299], [0.587], [0.114]], np.float32)  # ITU-R BT.601, as PIL's mode L
_JPEG_COLORSPACES = {1: "GRAY", 3: "RGB", 4: "RGBA"}
_OPENING = threading.Lock()  # PIL's own limit is a variable of its module
# Harmless to the pixels and common in images from the web and from phones; every other warning means damage.
_HARMLESS_WARNINGS = ("extraneous bytes", "unknown JFIF revision", "Invalid SOS parameters")


def decode_sample(
    sample: Mapping[str, bytes],
    in_chans: int,
    orientation: Orientation = "exif",
    value_range: ValueRange | None = None,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """The image of a webdataset sample dict, [H, W, in_chans], from its first member in IMAGE_EXTENSIONS.

    Photos give 1 (luma), 3 (RGB) or 4 (RGB and alpha, 255 where there is none) channels; TIFF and `.npy` hold any
    number.
    """
    for extension in IMAGE_EXTENSIONS:
        if extension in sample:
            return decode_file(sample[extension], in_chans, orientation, value_range, max_pixels)
    raise DecodeError(f"no image member ({', '.join(IMAGE_EXTENSIONS)}) in the sample")


def decode_file(
    data: bytes,
    in_chans: int,
    orientation: Orientation = "exif",
    value_range: ValueRange | None = None,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """The pixels [H, W, in_chans] of a file of any kind, which its first bytes tell; see those below."""
    if data.startswith(npy.MAGIC_PREFIX):
        return decode_npy(data, in_chans, value_range, max_pixels)
    stored = read_stored(data, max_pixels)
    if stored is not None:
        pixels = decode_stored(stored, in_chans, value_range)
        return pixels if orientation == "stored" else upright(pixels, read_orientation(data))
    return decode_image(data, in_chans, orientation, value_range, max_pixels)


def decode_stored(stored: Stored, in_chans: int, value_range: ValueRange | None = None) -> np.ndarray:
    """Stored values to pixels: their channels as they are, gray also as 3, red, green and blue also as luma, without
    alpha where that is one channel too many. Without a range of uint8 values only."""
    values = stored.values
    if values.dtype != np.uint8 and value_range is None:
        raise DecodeError(f"a {stored.kind} of {values.shape[2]} channels; data.range=[low, high] reads it")
    if stored.alpha and values.shape[2] != in_chans:
        values = values[..., :-1]
    if values.shape[2] == stored.colours == 1 and in_chans == 3:
        values = values.repeat(3, axis=2)
    elif values.shape[2] == stored.colours == 3 and in_chans == 1:
        luma = values.astype(np.float32) @ _LUMA
        values = luma.round().astype(np.uint8) if value_range is None else luma
    if values.shape[2] != in_chans:
        raise DecodeError(f"a {stored.kind} of {stored.values.shape[2]} channels, not in_chans={in_chans}")
    return np.ascontiguousarray(values) if value_range is None else _in_range(values, value_range)


def decode_image(
    data: bytes,
    in_chans: int,
    orientation: Orientation = "exif",
    value_range: ValueRange | None = None,
    max_pixels: int = MAX_PIXELS,
    scale: int = 1,
) -> np.ndarray:
    """JPEG, PNG or WebP bytes to uint8 [H, W, in_chans], upright; 16-bit values are shifted right by 8.

    Args:
        orientation: "stored" leaves the pixels as they lie in the file, whatever its EXIF orientation.
        value_range: stored values of any depth become float32 pixels, see `to_pixels_of_range`.
        max_pixels: a larger image is an error.
        scale: of a JPEG, 2, 4 or 8: decoded at this fraction of its sides, by a smaller inverse DCT.
    """
    if value_range is not None:
        if is_16_bit_png(data):
            values = _values_of_png(data, in_chans, max_pixels)
        else:
            values = decode_image(data, in_chans, "stored", max_pixels=max_pixels)
        pixels = _in_range(values, value_range)
        return pixels if orientation == "stored" else upright(pixels, read_orientation(data))
    if in_chans not in PIL_MODES:
        only = "a JPEG, PNG or WebP image gives 1, 3 or 4 channels"
        raise DecodeError(f"{only}, not in_chans={in_chans}; use TIFF or .npy")
    if not data:
        raise DecodeError("empty file")
    if data[:2] == b"\xff\xd8":
        image = _decode_jpeg(data, in_chans, max_pixels, scale)
    else:
        image = _decode_with_pil(data, in_chans, max_pixels)
    return image if orientation == "stored" else upright(image, read_orientation(data))


def decode_npy(
    data: bytes, in_chans: int, value_range: ValueRange | None = None, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """A `.npy` file of uint8 [H, W, in_chans], or [H, W] for one channel; with a range of any of ARRAY_TYPES.

    Its header is checked against the limits and the length of the file before anything else is done.
    """
    dtype, shape, fortran_order, start = _npy_header(data)
    shape = (*shape, 1) if len(shape) == 2 and in_chans == 1 else shape
    types = ("uint8",) if value_range is None else ARRAY_TYPES
    if str(dtype) not in types or len(shape) != 3 or shape[2] != in_chans or fortran_order:
        order = "Fortran" if fortran_order else "C"
        expected = f"expected {' or '.join(types)} (H, W, {in_chans}) in C order"
        way_out = "; data.range=[low, high] reads it" if str(dtype) in ARRAY_TYPES and str(dtype) not in types else ""
        raise DecodeError(f".npy holds {dtype} {shape} in {order} order, {expected}{way_out}")
    check_size(shape[1], shape[0], max_pixels)
    if len(data) - start != math.prod(shape) * dtype.itemsize:
        raise DecodeError(f".npy of shape {shape} has {len(data) - start} bytes of values")
    values = np.frombuffer(data, dtype, offset=start).reshape(shape)
    return values.copy() if value_range is None else _in_range(values, value_range)


def image_values(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[str, np.ndarray]:
    """(kind, values [H, W, C] as stored) of a file of any kind; of photos of 8 bits, RGB or gray.

    Raises:
        DecodeError: it cannot be used.
    """
    stored = read_stored(data, max_pixels)
    if stored is not None:
        return stored.kind, stored.values
    if is_16_bit_png(data):
        return "16-bit PNG", _read_16_bit_png(data, max_pixels)
    if not data.startswith(npy.MAGIC_PREFIX):
        return "8-bit image", decode_image(data, 1 if _is_gray(data) else 3, "stored", max_pixels=max_pixels)
    dtype, shape, fortran_order, start = _npy_header(data)
    if (
        str(dtype) not in ARRAY_TYPES
        or len(shape) not in (2, 3)
        or len(data) - start != math.prod(shape) * dtype.itemsize
    ):
        raise DecodeError(f".npy of {dtype} {shape}; expected {' or '.join(ARRAY_TYPES)} (H, W) or (H, W, C)")
    values = np.frombuffer(data, dtype, offset=start).reshape(shape, order="F" if fortran_order else "C")
    return f"{dtype} .npy", values if values.ndim == 3 else values[..., None]


def _is_gray(data: bytes) -> bool:
    try:
        return open_header(data).mode in ("1", "L")
    except (OSError, ValueError, SyntaxError):
        return False  # it is damaged, which its decoding states


def stored_values(data: bytes) -> tuple[str, np.ndarray] | None:
    """`image_values` of a file that holds more than 8 bits; None for another."""
    if not (is_16_bit_png(data) or data.startswith(npy.MAGIC_PREFIX) or holds_values(data)):
        return None
    kind, values = image_values(data)
    return None if values.dtype == np.uint8 else (kind, values)


def _npy_header(data: bytes) -> tuple[np.dtype, tuple[int, ...], bool, int]:
    """Type, shape, whether in Fortran order, and the offset of the values."""
    stream = io.BytesIO(data)
    try:
        version = npy.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise DecodeError(f".npy format {version} is not supported; write it with numpy.save")
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran_order, dtype = read_header(stream)
    except DecodeError:
        raise
    except Exception as error:  # the header is a Python literal, whose parser raises errors of any type
        raise DecodeError(f"not a .npy array: {str(error) or type(error).__name__}") from error
    return dtype, shape, fortran_order, stream.tell()


def _decode_jpeg(data: bytes, in_chans: int, max_pixels: int, scale: int) -> np.ndarray:
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        width, height = int(width), int(height)
        check_size(width, height, max_pixels, scale)
        if colorspace not in ("CMYK", "YCCK"):
            sides = {} if scale == 1 else {"min_height": -(-height // scale), "min_width": -(-width // scale)}
            return simplejpeg.decode_jpeg(data, colorspace=_JPEG_COLORSPACES[in_chans], **sides, strict=True)
    except DecodeError:
        raise
    except KeyError:  # colours or subsampling that simplejpeg does not know
        pass
    except ValueError as error:
        # libjpeg reports its first warning only. PIL continues after a harmless one, and still detects a truncation.
        if not any(warning in str(error) for warning in _HARMLESS_WARNINGS):
            raise DecodeError(f"JPEG: {error}") from error
    return _decode_with_pil(data, in_chans, max_pixels, scale)


def open_header(data: bytes, formats: Sequence[str] = ("JPEG", "PNG", "WEBP")) -> Image.Image:
    """An image with only its header read, of any size: its `size` is to be checked before it is decoded.

    Args:
        formats: names of Pillow.
    """
    with _OPENING:
        limit = Image.MAX_IMAGE_PIXELS
        try:
            Image.MAX_IMAGE_PIXELS = None
            return Image.open(io.BytesIO(data), formats=list(formats))
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _decode_with_pil(data: bytes, in_chans: int, max_pixels: int, scale: int = 1) -> np.ndarray:
    try:
        image = open_header(data)
        check_size(*image.size, max_pixels, scale)
        if scale > 1:
            image.draft(None, (image.width // scale, image.height // scale))
        image.load()
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return np.array(image.convert(PIL_MODES[in_chans])).reshape(image.height, image.width, in_chans)
    except DecodeError:
        raise
    except Image.UnidentifiedImageError as error:
        raise DecodeError(f"not a JPEG, PNG or WebP image: it starts with {data[:12]!r}") from error
    except Exception as error:  # decoders raise anything on damaged bytes: OSError, struct.error, AssertionError
        raise DecodeError(f"damaged image: {str(error) or type(error).__name__}") from error


def _values_of_png(data: bytes, in_chans: int, max_pixels: int) -> np.ndarray:
    """uint16 [H, W, in_chans] of a 16-bit PNG, float32 where colours become luma."""
    if in_chans not in (1, 3):
        raise DecodeError(f"a 16-bit PNG gives 1 or 3 channels, not in_chans={in_chans}; use TIFF or .npy")
    values = _read_16_bit_png(data, max_pixels)
    if values.shape[2] == in_chans:
        return values
    return values.repeat(3, axis=2) if in_chans == 3 else values.astype(np.float32) @ _LUMA


def _read_16_bit_png(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """uint16 [H, W, 1 or 3], without alpha."""
    try:
        check_size(*png_size(data), max_pixels)
        if data[25] == 0:  # gray
            image = open_header(data)
            values = np.asarray(image)[..., None].astype(np.uint16)
        else:  # PIL keeps 8 bits of colours
            import torch
            from torchvision.io import ImageReadMode, decode_png

            read = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.UNCHANGED)
            values = read.permute(1, 2, 0).numpy()
    except DecodeError:
        raise
    except Exception as error:  # decoders raise anything on damaged bytes
        raise DecodeError(f"damaged image: {str(error) or type(error).__name__}") from error
    return values[..., : 1 if values.shape[2] < 3 else 3]


def _in_range(values: np.ndarray, value_range: ValueRange) -> np.ndarray:
    try:
        return to_pixels_of_range(values, value_range)
    except ValueError as error:
        raise DecodeError(str(error)) from error


def reduction(data: bytes, shorter: int, max_pixels: int = MAX_PIXELS) -> int:
    """1, or for a JPEG above `max_pixels` the least of 2, 4, 8 that brings it below and keeps sides of `shorter`."""
    if data[:2] != b"\xff\xd8":
        return 1
    try:
        width, height = open_header(data).size
    except (OSError, ValueError, SyntaxError):
        return 1  # it is damaged, which its decoding states
    if width * height <= max_pixels:
        return 1
    fits = (n for n in (2, 4, 8) if width * height <= max_pixels * n**2 and min(width, height) >= shorter * n)
    return next(fits, 1)
