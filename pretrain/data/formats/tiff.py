"""TIFF and BigTIFF: strips and tiles, interleaved and separate bands, 8, 12 and 16 bits and floats (TIFF 6.0, 1992).

The file's directory is read with tifffile, its data decoded with imagecodecs. Both forgive much; here a file that does
not hold what it promises is an error. Smaller copies of the image and transparency masks in the same file are
ignored. A file of several full pages is refused: it does not say whether they are channels, slices or time.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import simplejpeg

from pretrain.core.images import MAX_PIXELS
from pretrain.data.formats.dicom import is_dicom
from pretrain.data.formats.stored import MAX_PAGES, DecodeError, SeveralPagesError, Stored, check_memory

_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0\x08\0\0\0", b"MM\0+\0\x08\0\0")
_JPEG = 7
_COMPRESSIONS = {1, 5, _JPEG, 8, 32773, 32946, 50000}  # none, LZW, JPEG, deflate, PackBits, deflate, Zstandard
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6
_ALPHAS = (1, 2)  # of ExtraSamples: associated, unassociated
_REDUCED, _MASK = 1, 4  # bits of NewSubfileType
_MOST_OVERVIEWS = 64
_SMALLEST_TILE = 256  # pixels; TIFF's sides of tiles are multiples of 16
_TYPES = {
    **{name: name for name in ("uint8", "uint16", "int16", "float32")},
    **{"bool": "uint8", "float16": "float32", "float64": "float32"},
}


def is_tiff(data: bytes) -> bool:
    """Whether a file or its beginning is a TIFF or BigTIFF, and no DICOM, whose first 128 bytes may look like one."""
    return data.startswith(_SIGNATURES) and not is_dicom(data)


def read_tiff(data: bytes, max_pixels: int = MAX_PIXELS, *, pages_are_channels: bool = False) -> Stored:
    """The image of a TIFF. One bit becomes 0 and 255, a palette its colours in 8 bits, float16 and float64 float32,
    and gray whose 0 is white is inverted; all other values are kept.

    Args:
        pages_are_channels: each page is one channel, in their order.

    Raises:
        DecodeError: it is damaged, too large, has several pages, or is of a kind that is not read.
    """
    import tifffile

    # Not its log: what is damaged is an error here.
    logging.getLogger("tifffile").disabled = True
    try:
        with tifffile.TiffFile(io.BytesIO(data), _multifile=False) as file:
            pages = _full_pages(file.pages)
            if not pages:
                raise DecodeError("damaged TIFF: no page")
            if len(pages) > 1 and not pages_are_channels:
                raise SeveralPagesError(
                    f"a TIFF of {len(pages)} pages; `fovea data write --pages channels` makes them channels, "
                    "or save each page as a file"
                )
            read = [_read_page(page, data, max_pixels, len(pages)) for page in pages]
    except DecodeError:
        raise
    except ImportError as error:
        raise DecodeError(f"{error}: pip install --upgrade tifffile imagecodecs") from error
    except Exception as error:  # of any type on damaged bytes
        raise DecodeError(f"damaged TIFF: {str(error) or type(error).__name__}") from error
    if len(read) == 1:
        return read[0]
    if len({(page.kind, page.values.shape) for page in read}) > 1 or read[0].values.shape[2] != 1:
        raise DecodeError("pages that differ in size or type, or have several channels, are no channels of one image")
    values = np.concatenate([page.values for page in read], axis=2)
    return Stored(read[0].kind, values)


def _full_pages(pages: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    passed = 0
    seen: set[int] = set()
    while len(found) <= MAX_PAGES and passed <= _MOST_OVERVIEWS:
        try:
            page = pages[len(found) + passed]
        except IndexError:
            return found
        if page.offset in seen:
            break
        seen.add(page.offset)
        if found and page.subfiletype & (_REDUCED | _MASK):
            passed += 1
        else:
            found.append(page)
    raise DecodeError(f"a TIFF of more than {MAX_PAGES} pages or {_MOST_OVERVIEWS} overviews, or with a loop of pages")


def _read_page(page: Any, data: bytes, max_pixels: int, count: int) -> Stored:
    """A page that is one of `count` to be held."""
    planes, depth, height, width, samples = page.shaped
    channels = planes * samples
    _check_kind(page, channels)
    if depth != 1:
        raise DecodeError(f"a TIFF of depth {depth}")
    check_memory(width, height, count * channels * page.dtype.itemsize, max_pixels)
    _check_segments(page, data, max_pixels)
    values = page.asarray(maxworkers=1)
    values = (values.transpose(1, 2, 0) if planes > 1 else values).reshape(height, width, channels)
    if page.photometric == _PALETTE:
        table = (np.asarray(page.colormap).T >> 8).astype(np.uint8)
        return Stored("palette TIFF", table[values[..., 0]], colours=3)
    if page.photometric == _WHITE_IS_ZERO:
        values = ~values if page.bitspersample == 1 else (2**page.bitspersample - 1 - values).astype(values.dtype)
    if page.bitspersample == 1:
        values = values * np.uint8(255)
    values = np.ascontiguousarray(values.astype(_TYPES[page.dtype.name], copy=False))
    alpha = len(page.extrasamples) == 1 and page.extrasamples[0] in _ALPHAS
    colours = 3 if page.photometric in (_RGB, _YCBCR) else int(channels - alpha == 1)
    return Stored(f"{values.dtype} TIFF", values, colours, alpha)


def _check_kind(page: Any, channels: int) -> None:
    """DecodeError for what is not read."""
    dtype, bits, photometric = page.dtype, page.bitspersample, page.photometric
    if dtype is None or dtype.name not in _TYPES or not (bits == 1 or bits >= 8 or photometric == _PALETTE):
        what = f"{bits} bits" if dtype is None or bits not in (8, 16, 32, 64, 128) else dtype.name
        raise DecodeError(f"a TIFF of {what} per value; save it as {', '.join(sorted(set(_TYPES.values())))}")
    if page.compression not in _COMPRESSIONS:
        name = getattr(page.compression, "name", page.compression)
        raise DecodeError(f"TIFF compression {name} is not read; save it with LZW, deflate or none")
    jpeg_colours = photometric == _YCBCR and page.compression == _JPEG
    if photometric not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE) and not jpeg_colours:
        raise DecodeError(
            f"TIFF colours {getattr(photometric, 'name', photometric)} are not read; save it as RGB or gray"
        )
    if photometric == _WHITE_IS_ZERO and dtype.kind not in "bu":
        raise DecodeError(f"a TIFF of {dtype} whose 0 is white; save it with 0 as black")
    if photometric == _PALETTE and (channels > 1 or bits > 8):
        raise DecodeError(f"a palette TIFF of {channels} channels of {bits} bits; save it as RGB")


def _check_segments(page: Any, data: bytes, max_pixels: int) -> None:
    """DecodeError where strips or tiles are missing, lie outside of the file or could need more memory."""
    planes, _, height, width, samples = page.shaped
    shape = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, width)
    if not all(shape) or (page.is_tiled and math.prod(shape) < _SMALLEST_TILE):
        raise DecodeError(f"damaged TIFF: tiles of {shape[1]} x {shape[0]} pixels")
    check_memory(shape[1], shape[0], samples * page.dtype.itemsize, max(max_pixels, _SMALLEST_TILE))
    expected = planes * math.ceil(height / shape[0]) * math.ceil(width / shape[1])
    offsets, sizes = page.dataoffsets, page.databytecounts
    if not len(offsets) == len(sizes) == expected:
        raise DecodeError(f"damaged TIFF: {len(offsets)} strips or tiles, expected {expected}")
    for number, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        if not offset or not size:
            raise DecodeError(f"a sparse TIFF: strip or tile {number} is not in the file; save it in full")
        if offset + size > len(data):
            raise DecodeError(f"damaged TIFF: strip or tile {number} ends after the file")
        if page.compression == _JPEG:  # its own header says how much memory its decoder takes
            found, across, _, _ = simplejpeg.decode_jpeg_header(data[offset : offset + size], strict=False)
            if found > shape[0] or across > shape[1]:
                raise DecodeError(f"damaged TIFF: a JPEG of {across} x {found} in {shape[1]} x {shape[0]} pixels")
