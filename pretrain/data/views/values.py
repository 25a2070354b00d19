"""Images of more than 8 bits: their stored values to pixels, by a range that the user states.

A file does not say which of its values are black and white: 12 bits of a detector lie in 16-bit files, reflectances in
uint16 or float32 arrays. `data.range` says it. Pixels stay in the unit of 8-bit images, 0 to 255, but as float32: no
level is lost before the device.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from pretrain.core.images import ValueRange

ARRAY_TYPES = ("uint8", "uint16", "int16", "float32")  # of .npy files, little-endian


def is_16_bit_png(data: bytes) -> bool:
    """Whether a file or its beginning is a PNG of 16 bits per channel."""
    return data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10"


def png_size(data: bytes) -> tuple[int, int]:
    """(width, height) in the header of a PNG; struct.error where it is cut."""
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def to_pixels_of_range(values: np.ndarray, value_range: ValueRange) -> np.ndarray:
    """Values [H, W, C] to pixels float32 [H, W, C]: the range's low end to 0, its high end to 255, clipped outside.

    Raises:
        ValueError: a value is NaN, or there is a range for another number of channels.
    """
    low, high = np.atleast_2d(np.asarray(value_range, np.float32)).T
    if len(low) not in (1, values.shape[2]):
        raise ValueError(f"data.range holds {len(low)} ranges, the image {values.shape[2]} channels")
    pixels = (values.astype(np.float32) - low) * (255 / (high - low))
    if np.isnan(pixels).any():
        raise ValueError("holds NaN")
    return pixels.clip(0, 255, out=pixels)


def recorded_range(record: Mapping[str, Any]) -> ValueRange | None:
    """The `data.range` in the record of a release; None where there is none."""
    found = record.get("range")
    if found is None:
        return None
    return tuple(tuple(pair) if isinstance(pair, list) else pair for pair in found)
