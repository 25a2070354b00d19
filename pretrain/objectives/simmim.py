"""Masked image modelling at its simplest: the encoder reads mask tokens, and a linear layer predicts the masked pixels.

Xie et al. 2021, "SimMIM: A Simple Framework for Masked Image Modeling", section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.core.trainable import Batch, ParamGroup
from pretrain.models import param_groups
from pretrain.models.backbones.contract import Backbone
from pretrain.models.layers.patches import gather_pixels, split_by_noise
from pretrain.models.losses.masked_cells import MaskedCells
from pretrain.models.pictures import drawing
from pretrain.objectives.base import Horizon, Objective, feature_std, images_of
from pretrain.objectives.configs.simmim import SimMIMConfig

EPS = 1e-5  # of the official loss, added to the number of masked pixels


class SimMIM(Objective[SimMIMConfig]):
    """Batch: "image" [b, 1, C, H, W] and "mask_noise" [b, cells], whose smallest numbers mark the visible cells; with
    drop path its uniform random numbers "drop_path" [b, depth, 2].

    The encoder sees every token, masked ones as `mask_token`. Only tokens with masked pixels are decoded.
    """

    head_prefixes = ("decoder.", "mask_token")

    def __init__(self, config: SimMIMConfig, backbone: Backbone, horizon: Horizon):
        super().__init__()
        self.config = config
        self.encoder = backbone
        self.mask_token = nn.Parameter(torch.zeros(1, 1, backbone.mask_dim))
        bound = 0.02 if "own_blocks" in backbone.provides else 2.0  # as in the official code
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-bound, b=bound)
        self.decoder = nn.Linear(backbone.embed_dim, backbone.in_chans * backbone.patch_size**2)

    @property
    def backbone(self) -> Backbone:
        return self.encoder

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        images = images_of(batch, "image")
        cells = self.cells(images, batch["mask_noise"])
        tokens = self.encode(images, cells, drop=batch.get("drop_path"))
        where = cells.tokens_to_decode()
        chosen = tokens if where is None else tokens.gather(1, where[..., None].expand(-1, -1, tokens.shape[2]))
        target = gather_pixels(images, self.encoder.patch_size, where).flatten(2).float()
        error = (self.decoder(chosen).float() - target).abs()
        masked = cells.pixels_of_tokens()
        if masked is not None:
            error = error.unflatten(2, (images.shape[1], -1)) * masked[:, :, None]
        return {
            "loss": error.sum() / (cells.num_masked_pixels + EPS) / images.shape[1],
            "feature_std": feature_std(tokens.mean(dim=1)),
        }

    def cells(self, images: Tensor, noise: Tensor) -> MaskedCells:
        """The masked cells of the images, from the noise [b, cells].

        Raises:
            ValueError: the noise does not have one number per cell.
        """
        total = self.config.num_cells((images.shape[2], images.shape[3]))
        if noise.shape[1] != total:
            raise ValueError(f"batch['mask_noise'] has {noise.shape[1]} numbers per image, there are {total} cells")
        _, masked = split_by_noise(noise, total - self.config.num_masked(total))
        size = (images.shape[2], images.shape[3])
        return MaskedCells(masked, size=size, cell=self.config.mask_cell, patch=self.encoder.patch_size)

    def encode(self, images: Tensor, cells: MaskedCells, drop: Tensor | None = None) -> Tensor:
        """The encoder's patch tokens [b, N, D] of the masked images."""
        tokens = self.encoder(images, drop=drop, mask=cells.for_encoder(), mask_token=self.mask_token)
        return tokens[:, self.encoder.num_prefix_tokens :]

    def reconstruct(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Predictions of every pixel, [b, N, D] -> [b, C, H, W]."""
        patch = self.encoder.patch_size
        pixels = self.decoder(tokens).float().reshape(len(tokens), *grid, -1, patch, patch)
        return pixels.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, grid[0] * patch, grid[1] * patch)

    def param_groups(self) -> list[ParamGroup]:
        """No weight decay for biases, 1-D parameters, class token and positions, nor for the mask token of a
        hierarchical backbone; that of a ViT decays (official code)."""
        names = param_groups.tokens_and_positions(self)
        if "own_blocks" not in self.encoder.provides:
            names.add("mask_token")
        return param_groups.split(self, no_decay_names=names)

    @torch.no_grad()
    def pictures(
        self, batch: Batch, step: int, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> dict[str, Tensor]:
        """One row per image (8 at most): the input, its visible pixels, these with the reconstruction."""
        images, noise = images_of(batch, "image")[:8], batch["mask_noise"][:8]
        drop = batch["drop_path"][:8] if "drop_path" in batch else None
        cells, patch = self.cells(images, noise), self.encoder.patch_size
        grid = (images.shape[2] // patch, images.shape[3] // patch)
        drawn, hidden = self.reconstruct(self.encode(images, cells, drop), grid), cells.pixels()[:, None]
        columns = [images, images.masked_fill(hidden, float("nan")), torch.where(hidden, drawn, images.float())]
        shown = [drawing.to_rgb(column, mean=mean, std=std) for column in columns]
        return {"input | masked | reconstruction": drawing.sheet(torch.stack(shown, dim=1))}
