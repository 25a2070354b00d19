"""Gram anchoring: keep the similarities between the patches of an image as an earlier network had them (Siméoni et al.
2025, "DINOv3", section 4).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]


def gram_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the cosine similarities of all pairs of patches of an image, in fp32.

    Args:
        student, teacher: patch features [b, N, D] and [b, N, D'] of the same N places; no gradient by the teacher's.
    """
    with torch.autocast(student.device.type, enabled=False):
        return F.mse_loss(similarities(student), similarities(teacher.detach()))


def similarities(features: Tensor) -> Tensor:
    """Cosine similarity of every pair of patches, fp32 [b, N, N] of [b, N, D]."""
    features = F.normalize(features.float(), dim=-1)
    return features @ features.transpose(1, 2)


def to_grid(features: Tensor, grid: Grid, wanted: Grid) -> Tensor:
    """Patch features [b, h * w, D] of a grid (h, w), bicubically resampled to another: [b, h' * w', D], fp32.

    Without low-pass filter, as in section 4.3: features of a larger picture averaged this way are the smoother target.
    """
    if grid == wanted:
        return features.float()
    table = features.float().transpose(1, 2).unflatten(2, grid)
    table = F.interpolate(table, size=wanted, mode="bicubic", align_corners=False, antialias=False)
    return table.flatten(2).transpose(1, 2)
