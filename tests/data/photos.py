"""Photos as cameras store them: turned, with the EXIF orientation that turns them back."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

BACK = {  # by orientation: from the upright photo to its stored pixels
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def stored(pixels: np.ndarray, orientation: int, image_format: str = "PNG") -> bytes:
    """The file of a photo that shows `pixels`; PNG and WebP are lossless."""
    exif, back = Image.Exif(), BACK[orientation]
    exif[0x0112] = orientation
    image = Image.fromarray(pixels)
    out = io.BytesIO()
    options = {"quality": 95, "subsampling": 0} if image_format == "JPEG" else {"lossless": True}
    (image if back is None else image.transpose(back)).save(out, image_format, exif=exif, **options)
    return out.getvalue()


def ramps(height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3], smooth, and another picture under each of the 8 orientations."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * y / height, 255 * x / width, 128 + 0 * x], -1).astype(np.uint8)
