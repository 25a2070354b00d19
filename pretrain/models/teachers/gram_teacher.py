"""Gram anchoring: regress the similarities between the patches of an image to those of an earlier network.

Siméoni et al. 2025, "DINOv3", section 4. The network is an earlier state of the teacher, or a release.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.backbones.contract import Backbone
from pretrain.models.importers import load_strict
from pretrain.models.layers.patches import grid_of
from pretrain.models.release.folder import read_release
from pretrain.models.teachers.ema import EMA

Grid = tuple[int, int]


class GramTeacher(nn.Module):
    """A copy of a backbone in buffers, which checkpoints contain; only `become` and `open` change it."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.network: EMA[Backbone] = EMA(backbone)

    def loss(self, patches: Tensor, images: Tensor, *, grid: Grid) -> Tensor:
        """Gram loss between the student's patches and this network's patches of the same crops.

        Args:
            patches: [b, N, D] on `grid`.
            images: [b, C, H, W], whose size may differ from the student's; their patches are resampled to `grid`.
        """
        tokens = self.network(images)[:, self.network.average.num_prefix_tokens :]
        return gram_loss(patches, to_grid(tokens, grid_of(images, self.network.average.patch_size), grid))

    def become(self, backbone: Backbone) -> None:
        """Copy the weights of a backbone of the same architecture."""
        self.network.average.load_state_dict(backbone.state_dict())

    def open(self, folder: Path | str) -> None:
        """Copy the weights of the backbone of a release.

        Raises:
            ValueError: it is not a release, or it has another backbone.
        """
        release = read_release(folder)
        try:
            load_strict(self.network.average, release.backbone, grid=release.grid)
        except ValueError as error:
            raise ValueError(f"objective.gram.release: {folder}: {error}") from error

    def train(self, mode: bool = True) -> GramTeacher:
        """Stays in evaluation mode."""
        del mode
        return super().train(False)


def gram_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the cosine similarities of all pairs of patches of an image, in fp32.

    Args:
        student, teacher: features [b, N, D] and [b, N, D'] of the same N positions; no gradient to the teacher's.
    """
    with torch.autocast(student.device.type, enabled=False):
        return F.mse_loss(similarities(student), similarities(teacher.detach()))


def similarities(features: Tensor) -> Tensor:
    """Cosine similarity of every pair of patches, fp32 [b, N, N] of [b, N, D]."""
    features = F.normalize(features.float(), dim=-1)
    return features @ features.transpose(1, 2)


def to_grid(features: Tensor, grid: Grid, wanted: Grid) -> Tensor:
    """Patch features [b, h * w, D] of a grid (h, w), bicubically resampled to another: [b, h' * w', D], fp32.

    Without low-pass filter, as in section 4.3: downsampled features of a larger image are a smoother target.
    """
    if grid == wanted:
        return features.float()
    table = features.float().transpose(1, 2).unflatten(2, grid)
    table = F.interpolate(table, size=wanted, mode="bicubic", align_corners=False, antialias=False)
    return table.flatten(2).transpose(1, 2)
