"""Images as a program holds them (NumPy arrays, PIL images, tensors, files) to uint8 [height, width, channels]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pretrain.core.files import read_bytes
from pretrain.core.images import Orientation, ValueRange
from pretrain.data.views.decode import PIL_MODES, decode_file
from pretrain.data.views.values import ARRAY_TYPES, to_pixels_of_range

ImageInput = np.ndarray | Image.Image | Tensor | Path | str


def to_pixels(
    image: ImageInput,
    in_chans: int,
    orientation: Orientation = "exif",
    value_range: ValueRange | None = None,
) -> np.ndarray:
    """One image as uint8 [H, W, in_chans]; with a range of stored values, files and deep arrays as float32, 0 to 255.

    Read are arrays uint8 [H, W, C] ([H, W] for one channel), PIL images, tensors [C, H, W] (uint8, or floating point
    within [0, 1]) and paths of JPEG, PNG, WebP, TIFF or `.npy` files. A file is turned upright by its EXIF
    orientation unless that is "stored"; a PIL image is taken as it is (`ImageOps.exif_transpose` turns it).

    Raises:
        ValueError: another shape, type, range or number of channels, or a file that cannot be decoded.
    """
    if isinstance(image, str | Path):
        return decode_file(read_bytes(image), in_chans, orientation, value_range)
    if isinstance(image, Image.Image):
        if in_chans not in PIL_MODES:
            raise ValueError(f"a PIL image has 1, 3 or 4 channels, not {in_chans}; give an array [H, W, {in_chans}]")
        return np.array(image.convert(PIL_MODES[in_chans])).reshape(image.height, image.width, in_chans)
    if isinstance(image, Tensor):
        return _array(_from_tensor(image), in_chans, "a tensor [C, H, W]")
    if value_range is not None and image.dtype.name in ARRAY_TYPES[1:]:
        image = image[..., None] if image.ndim == 2 else image
        _check_shape(image, in_chans, "an array [H, W, C]")
        return to_pixels_of_range(image, value_range)
    return _array(image, in_chans, "an array [H, W, C]")


def to_images(
    images: ImageInput | Sequence[ImageInput],
    in_chans: int,
    orientation: Orientation = "exif",
    value_range: ValueRange | None = None,
) -> list[np.ndarray]:
    """A list of images, one image, or a batch [n, H, W, C] (array) or [n, C, H, W] (tensor): uint8 [H, W, C] each."""
    if isinstance(images, np.ndarray | Tensor) and images.ndim == 4:
        return [to_pixels(image, in_chans, value_range=value_range) for image in images]
    if isinstance(images, np.ndarray | Image.Image | Tensor | Path | str):
        return [to_pixels(images, in_chans, orientation, value_range)]
    return [to_pixels(image, in_chans, orientation, value_range) for image in images]


def _from_tensor(image: Tensor) -> np.ndarray:
    if image.is_floating_point():
        if not bool(((image >= 0) & (image <= 1)).all()):
            raise ValueError("a floating-point tensor must hold pixels within [0, 1], not normalized values")
        image = (image * 255).round().to(torch.uint8)
    return image.detach().cpu().movedim(0, -1).numpy() if image.ndim == 3 else image.detach().cpu().numpy()


def _array(image: np.ndarray, in_chans: int, what: str) -> np.ndarray:
    if image.ndim == 2 and in_chans == 1:
        image = image[..., None]
    if image.dtype != np.uint8:
        raise ValueError(f"expected {what} of uint8 with {in_chans} channels, got {image.dtype} {tuple(image.shape)}")
    _check_shape(image, in_chans, f"{what} of uint8")
    return np.require(image, requirements=["C", "W"])  # torch wants arrays that can be written to


def _check_shape(image: np.ndarray, in_chans: int, what: str) -> None:
    if image.ndim != 3 or image.shape[2] != in_chans or not image.size:
        raise ValueError(f"expected {what} with {in_chans} channels, got {image.dtype} {tuple(image.shape)}")
