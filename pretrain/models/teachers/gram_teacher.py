"""Gram anchoring: regress the similarities between the patches of an image to those of an earlier network.

Siméoni et al. 2025, "DINOv3", section 4. The network is an earlier state of the teacher, or a release.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.backbones.contract import Backbone
from pretrain.models.importers import load_strict
from pretrain.models.layers.patches import grid_of
from pretrain.models.release.folder import read_release
from pretrain.models.teachers.ema import EMA

Grid = tuple[int, int]
Negatives = Literal["keep", "zero", "zero_teacher"]


class GramTeacher(nn.Module):
    """A copy of a backbone in buffers, which checkpoints contain; only `become` and `open` change it."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.network: EMA[Backbone] = EMA(backbone)

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


@torch.no_grad()
def gram_patches(network: Backbone, images: Tensor, *, grid: Grid, antialias: bool = False) -> Tensor:
    """A network's patches of crops [b, C, H, W] of any size, resampled to `grid`: [b, N, D], without gradient."""
    tokens = network(images)[:, network.num_prefix_tokens :]
    return to_grid(tokens, grid_of(images, network.patch_size), grid, antialias=antialias)


def gram_loss(student: Tensor, teacher: Tensor, *, normalize: bool = True, negatives: Negatives = "keep") -> Tensor:
    """Mean squared difference of the similarities of all pairs of patches of an image, in fp32.

    Args:
        student, teacher: features [b, N, D] and [b, N, D'] of the same N positions; no gradient to the teacher's.
        normalize: compare cosines, else dot products. negatives: "zero" sets the negative similarities of both to 0,
            "zero_teacher" those of the teacher.
    """
    with torch.autocast(student.device.type, enabled=False):
        of_student = similarities(student, normalize=normalize)
        of_teacher = similarities(teacher.detach(), normalize=normalize)
        if negatives == "zero":
            of_student = of_student.clamp(min=0)
        if negatives != "keep":
            of_teacher = of_teacher.clamp(min=0)
        return F.mse_loss(of_student, of_teacher) if of_student.numel() else of_student.sum()


def similarities(features: Tensor, *, normalize: bool = True) -> Tensor:
    """Similarity of every pair of patches, fp32 [b, N, N] of [b, N, D]: cosines or dot products."""
    features = F.normalize(features.float(), dim=-1) if normalize else features.float()
    return features @ features.transpose(1, 2)


def compared(patches: Tensor, mask: Tensor, *, level: str, tokens: str) -> Tensor:
    """The patches that are compared with each other, [b, n, D] of [b, N, D], or [1, n, D] at level "batch".

    Args:
        mask: bool [b, N], True where the student did not see a patch. tokens: "all", "masked" or "unmasked".
    """
    if tokens != "all":
        return patches[mask if tokens == "masked" else ~mask][None]
    return patches if level == "image" else patches.flatten(0, 1)[None]


def to_grid(features: Tensor, grid: Grid, wanted: Grid, *, antialias: bool = False) -> Tensor:
    """Patch features [b, h * w, D] of a grid (h, w), bicubically resampled to another: [b, h' * w', D], fp32.

    Without low-pass filter, as in section 4.3: downsampled features of a larger image are a smoother target.
    """
    if grid == wanted:
        return features.float()
    table = features.float().transpose(1, 2).unflatten(2, grid)
    table = F.interpolate(table, size=wanted, mode="bicubic", align_corners=False, antialias=antialias)
    return table.flatten(2).transpose(1, 2)
