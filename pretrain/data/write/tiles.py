"""Large images as tiles: squares of their pixels, each a sample of its own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pretrain.core.images import window_starts
from pretrain.data.views.decode import decode_image, image_values
from pretrain.data.views.orientation import read_orientation, upright
from pretrain.data.views.values import is_16_bit_png
from pretrain.data.write.images import (
    EXTENSIONS,
    Pages,
    check_finite,
    encoded,
    extension_of,
    open_array,
    open_image,
    read_pages,
    refusals,
)


def cut(
    data: bytes, *, tile: int, overlap: int, quality: int, max_pixels: int, pages: Pages = "refuse"
) -> Iterator[tuple[str, str, bytes]]:
    """(place "top_left" in pixels, extension, bytes to store) of the tiles of an upright image, row by row.

    Neighbours share at least `overlap` pixels; the last of a row or column ends with the image. A JPEG or WebP gives
    tiles of its kind at `quality`, PNG and values of 8 bits lossless ones, all other values npy.

    Raises:
        UnreadableImageError: why the image cannot be used.
    """
    with refusals(data):
        pixels, extension = _pixels(data, max_pixels, pages)
    height, width = pixels.shape[:2]
    for top in window_starts(height, tile, tile - overlap):
        for left in window_starts(width, tile, tile - overlap):
            part = pixels[top : top + tile, left : left + tile]
            yield f"{top}_{left}", extension, encoded(part, extension, quality)


def _pixels(data: bytes, max_pixels: int, pages: Pages) -> tuple[np.ndarray, str]:
    """The upright image [H, W, C] and the extension of its tiles."""
    if data.startswith(b"\x93NUMPY"):
        array = open_array(data, max_pixels)
        check_finite(array)
        return array if array.ndim == 3 else array[..., None], "npy"
    stored, _ = read_pages(data, max_pixels, pages)
    if stored is not None:
        return upright(stored.values, read_orientation(data)), extension_of(stored.values, stored.colours)
    if is_16_bit_png(data):
        _, values = image_values(data, max_pixels)
        return upright(values, read_orientation(data)), "png" if values.shape[2] == 1 else "npy"
    image = open_image(data, max_pixels)
    assert image.format is not None
    has_alpha = "A" in image.mode or "transparency" in image.info
    channels = 4 if has_alpha else 1 if image.mode in ("1", "L") else 3
    return decode_image(data, channels, max_pixels=max_pixels), EXTENSIONS[image.format]
