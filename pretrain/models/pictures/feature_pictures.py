"""Features as colours: the three main directions of a set of patch features, shown as red, green and blue."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.pictures import drawing


def pca_rgb(features: Sequence[Tensor], grid: tuple[int, int], size: tuple[int, int]) -> list[Tensor]:
    """Maps of patch features in colours that mean the same in all of them, uint8 [b, 3, H, W] each.

    The directions and the range are those of the first map. The sign of a direction, which PCA leaves open, makes its
    largest weight positive, so the same features always have the same colours.

    Args:
        features: [b, N, D] each, N = rows x columns of `grid`; NaN becomes gray. D is at least 1.
        size: (height, width) of the pictures in pixels.
    """
    first = features[0].detach().float().flatten(0, 1)
    known = first[first.isfinite().all(dim=1)]
    centre = known.mean(dim=0)
    _, vectors = torch.linalg.eigh((known - centre).T.double() @ (known - centre).double())
    axes = vectors[:, -3:].flip(1)
    largest = axes.abs().argmax(dim=0, keepdim=True)
    axes = (axes * axes.gather(0, largest).sign()).float()
    low, high = ((known - centre) @ axes).quantile(torch.tensor([0.02, 0.98], device=known.device), dim=0)
    shown = []
    for part in features:
        colours = ((part.detach().float() - centre) @ axes - low) / (high - low).clamp(min=1e-6)
        colours = F.pad(colours, (0, 3 - colours.shape[2]))  # of fewer than three channels
        image = (colours * 255).round().nan_to_num(128).clamp(0, 255).to(torch.uint8)
        image = image.transpose(1, 2).unflatten(2, grid)
        shown.append(F.interpolate(image.float(), size=size, mode="nearest").to(torch.uint8))
    return shown


def sheet(rgb: Tensor, hidden: Tensor, targets: Tensor, predictions: Tensor, *, patch_size: int) -> Tensor:
    """A row per image: the input, what the student saw of it, the targets, what was predicted; uint8 [3, h, w].

    Args:
        rgb: uint8 [b, 3, H, W]. hidden: bool [b, N], True for what the student did not see.
        targets: features of every patch [b, N, D]. predictions: the same, NaN where nothing was predicted.
    """
    size = (rgb.shape[2], rgb.shape[3])
    grid = (size[0] // patch_size, size[1] // patch_size)
    colours = pca_rgb([targets, predictions], grid, size)
    return drawing.sheet(torch.stack([rgb, gray_out(rgb, hidden, patch_size), *colours], dim=1))


def gray_out(images: Tensor, hidden: Tensor, patch_size: int) -> Tensor:
    """Pictures uint8 [b, 3, H, W] with the patches at True of `hidden` [b, N] in gray."""
    grid = (images.shape[2] // patch_size, images.shape[3] // patch_size)
    mask = hidden.unflatten(1, grid).repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
    mask = F.pad(mask, (0, images.shape[3] - mask.shape[2], 0, images.shape[2] - mask.shape[1]))  # an incomplete patch
    return images.masked_fill(mask[:, None], 128)
