"""The geometry of an evaluation: the shorter side resized with antialiasing, then a central crop."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.core.images import MAX_PIXELS
from pretrain.data.formats.stored import DecodeError


@dataclass(frozen=True)
class CenterCrop:
    """size: (height, width) of the crop. resize: length of the shorter side before it. Both in pixels."""

    size: tuple[int, int]
    resize: int
    interpolation: str = "bicubic"

    def __call__(self, image: np.ndarray) -> Tensor:
        """uint8 or float32 [H, W, C] to [C, h, w].

        Raises:
            DecodeError: an image so narrow that resizing would take all memory.
        """
        height, width = image.shape[:2]
        shorter = min(height, width)
        new = (self.resize * height // shorter, self.resize * width // shorter)
        if math.prod(new) > MAX_PIXELS:
            raise DecodeError(f"too long: {width} x {height} pixels would be resized to {new[1]} x {new[0]}")
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
        pixels = F.interpolate(pixels, size=new, mode=self.interpolation, antialias=True)[0]
        if pixels.is_floating_point():
            pixels.clamp_(0, 255)  # bicubic overshoots; the kernel for uint8 clips
        top, left = (round((a - b) / 2) for a, b in zip(new, self.size, strict=True))
        return pixels[:, top : top + self.size[0], left : left + self.size[1]]
