"""Pictures of a run: normalized tensors to RGB, and sheets of them. Everything is uint8 [..., 3, H, W]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GRAY = 128


def to_rgb(images: Tensor, *, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Normalized images [b, C, H, W] -> uint8 [b, 3, H, W]; NaN becomes gray.

    Of other than 3 channels the first three are shown, or the first alone in gray when there are fewer.
    """
    shape = (1, -1, 1, 1)
    pixels = images.float() * images.new_tensor(std).view(shape) + images.new_tensor(mean).view(shape)
    pixels = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    return (pixels * 255).round().nan_to_num(GRAY).clamp(0, 255).to(torch.uint8)


def sheet(pictures: Tensor, *, gap: int = 2) -> Tensor:
    """uint8 pictures [rows, columns, 3, H, W] on one white sheet [3, h, w], `gap` pixels apart."""
    padded = F.pad(pictures, (gap, gap, gap, gap), value=255)
    rows, columns, channels, height, width = padded.shape
    return padded.permute(2, 0, 3, 1, 4).reshape(channels, rows * height, columns * width)


def heat(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [..., h, w] enlarged to `size`, each scaled to its own maximum, from black over red and yellow to white."""
    maps = values.float().flatten(0, -3)[:, None]
    maps = F.interpolate(maps, size=size, mode="nearest")[:, 0]
    maps = maps / maps.amax(dim=(-2, -1), keepdim=True).clamp(min=1e-12)
    colours = torch.stack([(maps * 3 - offset).clamp(0, 1) for offset in (0, 1, 2)], dim=1)
    return (colours * 255).round().to(torch.uint8).unflatten(0, values.shape[:-2])


def overlay(image: Tensor, heat_map: Tensor) -> Tensor:
    """Half image, half heat map, both uint8 [..., 3, H, W]."""
    return ((image.float() + heat_map.float()) / 2).round().to(torch.uint8)
