"""The network whose similarities between patches are kept: an earlier state of the teacher, or a release.

Siméoni et al. 2025, "DINOv3", sections 4.2 and 4.3.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from pretrain.models.backbones.contract import Backbone
from pretrain.models.importers import load_strict
from pretrain.models.layers.patches import grid_of
from pretrain.models.losses.gram import Grid, gram_loss, to_grid
from pretrain.models.release.folder import read_release
from pretrain.models.teachers.ema import EMA


class GramTeacher(nn.Module):
    """A copy of a backbone, as buffers, so that a checkpoint holds it; it changes by `become` and `open` only."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.network: EMA[Backbone] = EMA(backbone)

    def loss(self, patches: Tensor, images: Tensor, *, grid: Grid) -> Tensor:
        """Gram loss of the student's patches and of what this network sees of the same crops.

        Args:
            patches: [b, N, D] on `grid`.
            images: [b, C, H, W], also of another size than the student's; their patches are resampled to `grid`.
        """
        tokens = self.network(images)[:, self.network.average.num_prefix_tokens :]
        return gram_loss(patches, to_grid(tokens, grid_of(images, self.network.average.patch_size), grid))

    def become(self, backbone: Backbone) -> None:
        """Take the weights of a backbone of the same kind."""
        self.network.average.load_state_dict(backbone.state_dict())

    def open(self, folder: Path | str) -> None:
        """Take the backbone of a release.

        Raises:
            ValueError: it is no release, or of another backbone.
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
