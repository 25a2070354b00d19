"""Masked autoencoder: mask most patches, encode the others, predict the pixels of the masked ones.

He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners", section 3 and appendix A.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.core.trainable import Batch
from pretrain.models.backbones.contract import Backbone
from pretrain.models.heads.mae_decoder import MAEDecoder
from pretrain.models.layers.patches import normalize_patches, patchify, split_by_noise, unpatchify
from pretrain.models.pictures import drawing
from pretrain.objectives.base import Horizon, Objective, feature_std, images_of
from pretrain.objectives.configs.mae import MAEConfig


class MAE(Objective[MAEConfig]):
    """Batch: "image" [b, 1, C, H, W] and "mask_noise" [b, N], whose smallest numbers mark the visible patches;
    with drop path its uniform random numbers "drop_path" [b, depth, 2]."""

    head_prefixes = ("decoder.",)

    def __init__(self, config: MAEConfig, backbone: Backbone, horizon: Horizon):
        super().__init__()
        self.config = config
        self.encoder = backbone
        self.decoder = MAEDecoder(
            in_dim=backbone.embed_dim,
            embed_dim=config.decoder_embed_dim,
            depth=config.decoder_depth,
            num_heads=config.decoder_num_heads,
            out_dim=backbone.patch_size**2 * backbone.in_chans,
            grid_size=backbone.grid_size,
            mlp_ratio=backbone.mlp_ratio,
        )

    @property
    def backbone(self) -> Backbone:
        return self.encoder

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        images = images_of(batch, "image")
        keep, masked = self.split(batch["mask_noise"])
        latent = self.encoder(images, keep=keep, drop=batch.get("drop_path"))
        pred = self.decoder(self._without_registers(latent), keep, masked).float()
        target = patchify(images, self.encoder.patch_size, masked).float()
        if self.config.norm_pix_loss:
            target, _, _ = normalize_patches(target)
        return {
            "loss": (pred - target).square().mean(),
            "feature_std": feature_std(latent[:, 0]),
            "pred_std": pred.detach().std(),
        }

    def split(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of visible and masked patches from the noise [b, N]: int64 [b, k] and [b, N - k]."""
        return split_by_noise(noise, self.config.num_keep(noise.shape[1]))

    def predict(self, images: Tensor, keep: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruct all patches: (latent [b, 1 + R + k, D], prediction of every patch [b, N, p * p * C])."""
        latent = self.encoder(images, keep=keep)
        return latent, self.decoder.predict(self._without_registers(latent), keep, masked)

    @torch.no_grad()
    def pictures(
        self, batch: Batch, step: int, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> dict[str, Tensor]:
        """One row per image (8 at most): the input, its visible patches, these with the reconstruction."""
        images, noise = images_of(batch, "image")[:8], batch["mask_noise"][:8]
        keep, masked = self.split(noise)
        _, pred = self.predict(images, keep, masked)
        patches = patchify(images, self.encoder.patch_size).float()
        if self.config.norm_pix_loss:
            _, patch_mean, patch_std = normalize_patches(patches)
            pred = pred.float() * patch_std + patch_mean
        hidden = torch.zeros_like(noise, dtype=torch.bool).scatter(1, masked, True)[..., None]
        grid = (images.shape[2] // self.encoder.patch_size, images.shape[3] // self.encoder.patch_size)
        columns = [patches, patches.masked_fill(hidden, float("nan")), torch.where(hidden, pred.float(), patches)]
        rows = [unpatchify(column, self.encoder.patch_size, grid) for column in columns]
        shown = [drawing.to_rgb(row, mean=mean, std=std) for row in rows]
        return {"input | masked | reconstruction": drawing.sheet(torch.stack(shown, dim=1))}

    def _without_registers(self, latent: Tensor) -> Tensor:
        """Class token and patches, without registers: the decoder does not read them."""
        prefix = self.encoder.num_prefix_tokens
        return latent if prefix == 1 else torch.cat([latent[:, :1], latent[:, prefix:]], dim=1)
