"""Transforms of images for a classifier: in training a random crop and augmentation, else a central crop.

Random numbers come from a generator keyed by the sample's position; they are drawn in a fixed order and number, so a
setting that is turned off does not change the other numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.data.examples import Example
from finetune.data.transforms.randaugment import UNIFORMS, rand_augment
from pretrain.data.views import crops

_ERASE_TRIES = 10
_OPERATIONS = 4  # random numbers are always drawn for this number of operations


@dataclass(frozen=True)
class TrainTransform:
    """An example to {"image", "label" int64 []}.

    A random resized crop of `size` (h, w) pixels, flips, colour jitter, RandAugment; "image" is [C, h, w] of the
    example's type, pixels in 0 to 255. With erasing it is float32, because the erased part becomes noise that is
    standard normal once it is normalized (Zhong et al. 2017, as timm's mode "pixel").

    Attributes:
        scale, ratio: of the crop's area and aspect. whole: no crop, the complete image is resized to `size`.
        hflip, vflip: probabilities. color_jitter: largest relative change of brightness, contrast and saturation.
        operations: of RandAugment, at `magnitude` of 10 +- `magnitude_std`; 0: none.
        erase: probability. erase_area: of the image.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bicubic"
    whole: bool = False
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.0
    operations: int = 0
    magnitude: float = 9.0
    magnitude_std: float = 0.5
    erase: float = 0.0
    erase_area: tuple[float, float] = (0.02, 1 / 3)

    def __call__(self, example: Example, rng: np.random.Generator) -> dict[str, Any]:
        geometry, colour = rng.random(crops.BOX_UNIFORMS), rng.random(5)
        policy, erasing = rng.random((_OPERATIONS, UNIFORMS)), rng.random(2 * _ERASE_TRIES + 3)
        image = self._crop(example.image, geometry.tolist())
        if colour[0] < self.hflip:
            image = image.flip(2)
        if colour[1] < self.vflip:
            image = image.flip(1)
        if self.operations:
            pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
            changed = rand_augment(
                pixels,
                policy[: self.operations],
                magnitude=self.magnitude,
                magnitude_std=self.magnitude_std,
                fill=tuple(min(255, round(255 * value)) for value in self.mean),
            )
            image = torch.from_numpy(np.array(changed)).permute(2, 0, 1)
        if self.color_jitter:
            image = jitter(image, self.color_jitter, colour[2:].tolist())
        if self.erase:
            image = self._erased(image, erasing.tolist(), rng)
        return {"image": image.contiguous(), "label": torch.tensor(example.target)}

    def _crop(self, image: np.ndarray, uniforms: Sequence[float]) -> Tensor:
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
        height, width = image.shape[:2]
        box = (0, 0, height, width) if self.whole else crops.crop_box(uniforms, height, width, self.scale, self.ratio)
        out = torch.empty((1, *self.size, image.shape[2]), dtype=pixels.dtype).permute(0, 3, 1, 2)
        crops.resize_into(out, pixels, box, self.interpolation)
        return out[0]

    def _erased(self, image: Tensor, uniforms: Sequence[float], rng: np.random.Generator) -> Tensor:
        """Pixels float32, with a rectangle of noise in some images; a rectangle that does not fit is drawn again."""
        mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (self.mean, self.std))
        image = image.float()
        if uniforms[0] >= self.erase:
            return image
        height, width = self.size
        low, high = self.erase_area
        for attempt in range(_ERASE_TRIES):
            area = height * width * (low + (high - low) * uniforms[3 + 2 * attempt])
            aspect = math.exp((2 * uniforms[4 + 2 * attempt] - 1) * math.log(1 / 0.3))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < height and w < width:
                top, left = int(uniforms[1] * (height - h + 1)), int(uniforms[2] * (width - w + 1))
                noise = rng.standard_normal((image.shape[0], h, w), dtype=np.float32)
                image[:, top : top + h, left : left + w] = (torch.from_numpy(noise) * std + mean) * 255
                break
        return image


@dataclass(frozen=True)
class EvalTransform:
    """An example to {"image" [C, h, w] of its type, "label" int64 [], "original_size" int64 [2]}.

    The shorter side is resized to `resize` pixels (default: 256 / 224 of the size) with antialiasing, and the central
    `size` is cropped: Resize(256), CenterCrop(224) of the official code. whole: resized to `size`, without a crop.
    """

    size: tuple[int, int]
    resize: int | None = None
    interpolation: str = "bicubic"
    whole: bool = False

    @property
    def shorter(self) -> int:
        """Pixels of the shorter side before the crop."""
        return round(max(self.size) * 256 / 224) if self.resize is None else self.resize

    def in_words(self) -> str:
        h, w = self.size
        if self.whole:
            return f"images resized to {h} x {w} px ({self.interpolation})"
        return f"images: shorter side {self.shorter} px ({self.interpolation}), central {h} x {w} px"

    def __call__(self, example: Example) -> dict[str, Any]:
        height, width = example.image.shape[:2]
        pixels = torch.from_numpy(example.image).permute(2, 0, 1)[None]
        new, (h, w) = self.size, self.size
        if not self.whole:
            side, least = self.shorter, min(height, width)
            new = (max(h, side * height // least), max(w, side * width // least))
        image = F.interpolate(pixels, size=new, mode=self.interpolation, antialias=True)[0]
        image = image.clamp(0, 255) if image.is_floating_point() else image
        top, left = round((new[0] - h) / 2), round((new[1] - w) / 2)
        label = -1 if example.target is None else example.target
        return {
            "image": image[:, top : top + h, left : left + w].contiguous(),
            "label": torch.tensor(label),
            "original_size": torch.tensor([height, width]),
        }


def jitter(image: Tensor, strength: float, uniforms: Sequence[float]) -> Tensor:
    """Brightness, contrast and saturation of [C, H, W] in 0 to 255, each times a random factor of 1 +- strength.

    Contrast is around the mean of the luma, of other than 3 channels of all; these have no saturation.
    """
    brightness, contrast, saturation = (max(0.0, 1 + (2 * u - 1) * strength) for u in uniforms)
    x = (image.float() / 255 * brightness).clamp_(0, 1)
    x = torch.lerp(_luma(x).mean().expand_as(x), x, contrast).clamp_(0, 1)
    if len(x) == 3:
        x = torch.lerp(_luma(x).expand_as(x), x, saturation).clamp_(0, 1)
    return x * 255 if image.is_floating_point() else (x * 255).round_().to(torch.uint8)


def _luma(x: Tensor) -> Tensor:
    if len(x) != 3:
        return x.mean(0, keepdim=True)
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)
