"""Images with a map of their pixels (class ids, depths) to tensors: random scale, crop, mirror and colour, or complete.

The augmentation of the field for ADE20K (as in BEiT, MAE and DINOv2's transfer): scales 0.5 to 2, a crop in which no
class fills more than 3/4, mirrored half the time, SSD's photometric distortion (Liu et al. 2016).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv

CROP_TRIES = 10
BRIGHTNESS = 32.0  # of 255, added
SPREAD = (0.5, 1.5)  # of contrast and saturation
HUE = 0.1  # of the colour circle: 18 of the 180 that it has in OpenCV's bytes


@dataclass(frozen=True)
class DenseTrain:
    """One random crop of an image and its map.

    Args:
        crop: (height, width) in pixels.
        resize: the shorter side at scale 1, in pixels; None: that of the image.
        scale: range of the random factor.
        cat_max_ratio: a crop of class ids is drawn again, up to 10 times, while one class fills more of it; 1: never.
        void: the value of the map where it is unknown and outside the image.
        fill: pixel outside the image, in 0 to 255.
        scale_values: the map's values are lengths, and are divided by the factor (Eigen et al. 2014, section 3.4).
    """

    crop: tuple[int, int]
    resize: int | None
    scale: tuple[float, float]
    hflip: float
    photometric: bool
    cat_max_ratio: float
    void: float
    fill: tuple[float, ...]
    scale_values: bool = False

    def __call__(self, image: np.ndarray, target: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Image [H, W, C] and map [H, W] -> [C, h, w] of its type and the map [h, w], of the size of the crop."""
        factor = rng.uniform(*self.scale)
        size = scaled_size(image.shape[:2], self.resize, factor)
        pixels = resize_image(image, size)
        if self.scale_values:
            target = target / (size[0] / image.shape[0])
        rows, columns = nearest(image.shape[0], size[0]), nearest(image.shape[1], size[1])
        top, left = self._corner(target, rows, columns, rng)
        rows, columns = rows[top : top + self.crop[0]], columns[left : left + self.crop[1]]
        pixels = pixels[:, top : top + self.crop[0], left : left + self.crop[1]]
        values = target[rows[:, None], columns]
        if rng.random() < self.hflip:
            pixels, values = pixels.flip(2), values[:, ::-1]
        if self.photometric:
            pixels = photometric(pixels, rng)
        return self._padded(pixels, values)

    def _corner(
        self, target: np.ndarray, rows: np.ndarray, columns: np.ndarray, rng: np.random.Generator
    ) -> tuple[int, int]:
        top = left = 0
        for _ in range(CROP_TRIES if self.cat_max_ratio < 1 else 1):
            top = int(rng.integers(max(len(rows) - self.crop[0], 0) + 1))
            left = int(rng.integers(max(len(columns) - self.crop[1], 0) + 1))
            if self.cat_max_ratio >= 1:
                break
            part = target[rows[top : top + self.crop[0], None], columns[left : left + self.crop[1]]]
            counts = np.unique(part[part != self.void], return_counts=True)[1]
            if len(counts) > 1 and counts.max() < self.cat_max_ratio * counts.sum():
                break
        return top, left

    def _padded(self, pixels: Tensor, values: np.ndarray) -> tuple[Tensor, Tensor]:
        height, width = pixels.shape[1:]
        target = torch.full(self.crop, self.void, dtype=torch.from_numpy(values[:0].copy()).dtype)
        target[:height, :width] = torch.from_numpy(np.ascontiguousarray(values))
        if (height, width) == self.crop:
            return pixels.contiguous(), target
        image = canvas(self.fill, self.crop, pixels.dtype)
        image[:, :height, :width] = pixels
        return image, target


@dataclass(frozen=True)
class DenseEval:
    """The complete image, [H, W, C] -> [C, h, w] of its type. resize: its shorter side; None: unchanged."""

    resize: int | None

    def __call__(self, image: np.ndarray) -> Tensor:
        return resize_image(image, scaled_size(image.shape[:2], self.resize, 1.0)).contiguous()


def scaled_size(size: Sequence[int], resize: int | None, factor: float) -> tuple[int, int]:
    """(height, width) with the shorter side `resize` (None: unchanged), times `factor`, at least one pixel."""
    if resize is not None:
        factor *= resize / min(size)
    return max(round(size[0] * factor), 1), max(round(size[1] * factor), 1)


def resize_image(image: np.ndarray, size: tuple[int, int]) -> Tensor:
    """[H, W, C] -> [C, h, w] of its type, bilinear with antialiasing."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    if tuple(pixels.shape[1:]) == size:
        return pixels
    return F.interpolate(pixels[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]


def canvas(fill: Sequence[float], size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """[C, h, w] of one pixel `fill` in 0 to 255, rounded where the type is uint8."""
    pixel = torch.tensor(fill, dtype=torch.float32)
    return (pixel if dtype.is_floating_point else pixel.round()).to(dtype)[:, None, None].repeat(1, *size)


def nearest(length: int, resized: int) -> np.ndarray:
    """For each of `resized` pixels of a side the index of the one of `length` below its centre, int64 [resized]."""
    return ((np.arange(resized) + 0.5) * length / resized).astype(np.int64)


def photometric(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue of [C, H, W] in 0 to 255, each changed half the time.

    Saturation and hue are those of RGB: other than 3 channels keep them.
    """
    x = pixels.float()
    if rng.random() < 0.5:
        x = x + float(rng.uniform(-BRIGHTNESS, BRIGHTNESS))
    contrast_first = rng.random() < 0.5
    contrast = float(rng.uniform(*SPREAD)) if rng.random() < 0.5 else 1.0
    if contrast_first:
        x = x * contrast
    x = x.clamp_(0, 255)
    if len(x) == 3 and rng.random() < 0.5:
        x = saturate(x, float(rng.uniform(*SPREAD)))
    if len(x) == 3 and rng.random() < 0.5:
        x = tv.adjust_hue(x / 255, float(rng.uniform(-HUE, HUE))) * 255
    if not contrast_first:
        x = x * contrast
    x = x.clamp_(0, 255)
    return x if pixels.is_floating_point() else x.round_().to(torch.uint8)


def saturate(x: Tensor, factor: float) -> Tensor:
    """Multiply HSV's saturation of [3, H, W] in 0 to 255 by `factor`, to at most 1; hue and value do not change."""
    value, least = x.amax(dim=0), x.amin(dim=0)
    most = value / (value - least).clamp(min=1e-6)
    return value - (value - x) * most.clamp(max=factor)
