"""The EXIF orientation of a photo: how its stored pixels are turned to stand upright.

A camera stores the pixels as its sensor lies and writes the orientation, 1 to 8, into the file (CIPA DC-008, EXIF 2.32,
tag 0x0112). Viewers and annotation tools turn the photo; most official pretraining codes do not. Orientation 1, a file
without the tag, and a damaged tag all mean: upright as stored.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np

from pretrain.core.images import Orientation
from pretrain.data.formats.tiff import is_tiff

UPRIGHT = 1
SWAPS_SIDES = range(5, 9)  # the orientations whose upright photo has the stored width as its height
_TAG = 0x0112
_FORMATS = {1: "B", 3: "H", 4: "I"}  # BYTE, SHORT (the standard's), LONG
_PREFIX = b"Exif\0\0"


def read_orientation(data: bytes) -> int:
    """The EXIF orientation, 1 to 8, of a JPEG, PNG, WebP or TIFF file or of its beginning; only headers are read."""
    try:
        if data[:2] == b"\xff\xd8":
            tiff = _in_jpeg(data)
        elif data[:8] == b"\x89PNG\r\n\x1a\n":
            tiff = _in_png(data)
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            tiff = _in_webp(data)
        elif is_tiff(data):
            tiff = data
        else:
            return UPRIGHT
        return UPRIGHT if tiff is None else _of_tiff(tiff)
    except (struct.error, IndexError):  # it ends within a header
        return UPRIGHT


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Stored pixels [H, W, ...] turned by an EXIF orientation, C-contiguous; `pixels` itself for orientation 1."""
    if orientation == UPRIGHT:
        return pixels
    turned = pixels.swapaxes(0, 1) if orientation in SWAPS_SIDES else pixels
    if orientation in (3, 4, 7, 8):
        turned = turned[::-1]
    if orientation in (2, 3, 6, 7):
        turned = turned[:, ::-1]
    return np.ascontiguousarray(turned)


def recorded_orientation(record: Mapping[str, Any]) -> Orientation:
    """How the photos that a release was trained on were read; releases older than the entry ignored the tag.

    Raises:
        ValueError: the entry is of a newer version.
    """
    found = record.get("orientation", "stored")
    if found not in get_args(Orientation):
        raise ValueError(f"orientation {found!r} in the record; this version reads {', '.join(get_args(Orientation))}")
    return found


def _in_jpeg(data: bytes) -> bytes | None:
    """The first APP1 segment with EXIF, before the image data."""
    at = 2
    while data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == 0xDA:  # start of scan
            return None
        (length,) = struct.unpack_from(">H", data, at + 2)
        if marker == 0xE1 and data[at + 4 : at + 10] == _PREFIX:
            return data[at + 10 : at + 2 + length]
        at += 2 + length
    return None


def _in_png(data: bytes) -> bytes | None:
    if b"eXIf" not in data:
        return None
    at = 8
    while True:
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"eXIf":
            return data[at + 8 : at + 8 + length].removeprefix(_PREFIX)
        if kind == b"IEND":
            return None
        at += 12 + length


def _in_webp(data: bytes) -> bytes | None:
    if data[12:16] != b"VP8X" or not data[20] & 0x08:  # the flag of an EXIF chunk
        return None
    at = 12
    while True:
        kind, length = struct.unpack_from("<4sI", data, at)
        if kind == b"EXIF":
            return data[at + 8 : at + 8 + length].removeprefix(_PREFIX)
        at += 8 + length + length % 2


def _of_tiff(tiff: bytes) -> int:
    """The value of the tag in the first directory."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return UPRIGHT
    # The types of an offset and of the number of entries, and the bytes: before the first offset, of that number, of an
    # entry, before its value. BigTIFF is version 43.
    big = struct.unpack_from(f"{order}H", tiff, 2) == (43,)
    offset, many, before, counted, entry, value_at = ("Q", "Q", 8, 8, 20, 12) if big else ("I", "H", 4, 2, 12, 8)
    (first,) = struct.unpack_from(order + offset, tiff, before)
    (count,) = struct.unpack_from(order + many, tiff, first)
    for at in range(first + counted, first + counted + entry * count, entry):
        tag, kind, number = struct.unpack_from(f"{order}HH{offset}", tiff, at)
        if tag == _TAG and number == 1 and kind in _FORMATS:
            (value,) = struct.unpack_from(order + _FORMATS[kind], tiff, at + value_at)
            return value if value in range(1, 9) else UPRIGHT
    return UPRIGHT
