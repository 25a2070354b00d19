"""Pictures of visual tokens; uint8 [3, H, W]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.layers.patches import patchify, unpatchify
from pretrain.models.pictures import drawing

Stats = tuple[float, ...]


def masked_sheet(
    images: Tensor, mask: Tensor, *, patch_size: int, mean: Stats, std: Stats, decoded: Tensor | None = None
) -> Tensor:
    """One row per image: the input, its visible patches, what the predicted tokens look like where they can be seen.

    Args:
        images: normalized [b, C, H, W]. mask: bool [b, N], True where hidden. decoded: in [0, 1], [b, C, h, w].
    """
    rgb = drawing.to_rgb(images, mean=mean, std=std)
    grid = (images.shape[2] // patch_size, images.shape[3] // patch_size)
    visible = patchify(images.float(), patch_size).masked_fill(mask[..., None], float("nan"))
    columns = [rgb, drawing.to_rgb(unpatchify(visible, patch_size, grid), mean=mean, std=std)]
    if decoded is not None:
        columns.append(_fit(drawing.to_rgb(decoded, mean=(0.0,) * len(mean), std=(1.0,) * len(std)), images))
    return drawing.sheet(torch.stack(columns, dim=1))


def pairs_sheet(images: Tensor, other: Tensor, *, mean: Stats, std: Stats) -> Tensor:
    """One row per image: two normalized pictures [b, C, H, W] side by side."""
    shown = [drawing.to_rgb(column, mean=mean, std=std) for column in (images, other)]
    return drawing.sheet(torch.stack(shown, dim=1))


def code_sheet(images: Tensor, ids: Tensor, *, num_codes: int, mean: Stats, std: Stats) -> Tensor:
    """One row per image: the input, and the map of its codes int64 [b, h, w], a colour for each code."""
    rgb = drawing.to_rgb(images, mean=mean, std=std)
    codes = torch.arange(num_codes, device=ids.device, dtype=torch.float32)
    # Multiples of irrational numbers spread evenly and give neighbouring codes different colours.
    palette = torch.stack([(codes * step) % 1.0 for step in (0.618034, 0.754878, 0.569840)], dim=1)
    colours = (palette * 255).to(torch.uint8)[ids].permute(0, 3, 1, 2)
    return drawing.sheet(torch.stack([rgb, _fit(colours, images)], dim=1))


def _fit(picture: Tensor, images: Tensor) -> Tensor:
    return F.interpolate(picture.float(), size=images.shape[2:], mode="nearest").to(torch.uint8)
