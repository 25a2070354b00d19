"""The values of an image file as they are stored, and the limits that hold before anything is decoded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pretrain.core.images import MAX_PIXELS

MAX_SIDE = 65_535  # of a JPEG; memory depends on the number of pixels alone
BYTES_PER_PIXEL = 16  # `max_pixels` counts pixels of up to four float32 channels; more channels, fewer pixels
MAX_PAGES = 1024  # that become channels


class DecodeError(ValueError):
    """An image that cannot be used; the message is the reason."""


class SeveralPagesError(DecodeError):
    """A file that holds more than one image."""


@dataclass(frozen=True)
class Stored:
    """An image of any depth, as it lies in its file.

    kind       "uint16 TIFF"
    values     [H, W, C], uint8, uint16, int16 or float32
    colours    the first channels are 1: gray, 3: red, green, blue, 0: bands of any meaning
    alpha      whether the last channel is alpha
    extension  of its member in a shard; empty: the file itself is not kept, since it holds more than an image
    """

    kind: str
    values: np.ndarray
    colours: int = 0
    alpha: bool = False
    extension: str = "tif"


def check_size(width: int, height: int, max_pixels: int = MAX_PIXELS, scale: int = 1) -> None:
    """Refuse an image that would take too much memory at 1 / `scale` of its sides.

    Raises:
        DecodeError: it has no pixels, or too many.
    """
    if width < 1 or height < 1:
        raise DecodeError(f"image of {width} x {height} pixels")
    if max(width, height) > MAX_SIDE:
        raise DecodeError(f"too large: {width} x {height} pixels, the limit is {MAX_SIDE} a side")
    if width * height > max_pixels * scale**2:
        megapixels = f"{width * height / 1e6:.1f} megapixels, the limit is {max_pixels / 1e6:g}"
        raise DecodeError(f"too large: {width} x {height} pixels, {megapixels} (data.max_pixels, --max-pixels)")


def check_memory(width: int, height: int, pixel_bytes: int, max_pixels: int = MAX_PIXELS) -> None:
    """The same for an image of any number of channels, `pixel_bytes` for each pixel."""
    check_size(width, height, max_pixels)
    needed, limit = width * height * pixel_bytes, BYTES_PER_PIXEL * max_pixels
    if needed > limit:
        raise DecodeError(
            f"too large: {width} x {height} pixels of {pixel_bytes} bytes, {needed / 1e6:.0f} MB; the limit is "
            f"{limit / 1e6:.0f} MB, {BYTES_PER_PIXEL} bytes for each pixel of data.max_pixels, --max-pixels"
        )
