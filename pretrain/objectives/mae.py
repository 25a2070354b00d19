"""Masked autoencoder: mask most patches, encode the others, predict the pixels of the masked ones.

He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners", section 3 and appendix A.1. With cells of several
patches, several class tokens and learned positions: Yang et al. 2025, "In Pursuit of Pixel Supervision for Visual
Pre-training" (Pixio).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.core.trainable import Batch, ParamGroup
from pretrain.models import param_groups
from pretrain.models.backbones.contract import Backbone
from pretrain.models.heads.mae_decoder import MAEDecoder
from pretrain.models.layers.patches import normalize_patches, patches_of_cells, patchify, split_by_noise, unpatchify
from pretrain.models.pictures import drawing
from pretrain.objectives.base import Horizon, Objective, feature_std, images_of
from pretrain.objectives.configs.mae import MAEConfig

TOKEN_STD = 0.02  # of Pixio's class tokens and positions at the start


class MAE(Objective[MAEConfig]):
    """Batch: "image" [b, 1, C, H, W] and "mask_noise" [b, N / mask_grid^2], whose smallest numbers mark the visible
    cells; with drop path its uniform random numbers "drop_path" [b, depth, 2].

    Pixio's class tokens after the first are our registers. There each has a row in the position table: two weights that
    are only ever added. Both get the same gradient, so AdamW moves their sum by twice the learning rate and half the
    weight decay, as it moves the registers here.
    """

    head_prefixes = ("decoder.",)

    def __init__(self, config: MAEConfig, backbone: Backbone, horizon: Horizon):
        super().__init__()
        self.config = config
        self.encoder = backbone
        if config.positions == "learned":
            backbone.train_positions(std=TOKEN_STD)
        for token in self._further_class_tokens().values():
            position = nn.init.trunc_normal_(torch.empty_like(token), std=TOKEN_STD)
            token.data.normal_(std=TOKEN_STD).add_(position)
        self.decoder = MAEDecoder(
            in_dim=backbone.embed_dim,
            embed_dim=config.decoder_embed_dim,
            depth=config.decoder_depth,
            num_heads=config.decoder_num_heads,
            out_dim=backbone.patch_size**2 * backbone.in_chans,
            positions=backbone.grid_size,
            mlp_ratio=backbone.mlp_ratio,
            num_class_tokens=backbone.num_prefix_tokens if config.registers_are_class_tokens else 1,
            learned=config.positions == "learned",
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
        """Indices of visible and masked patches from the noise of the cells: int64 [b, k] and [b, N - k]."""
        keep, masked = split_by_noise(noise, self.config.num_keep(noise.shape[1]))
        grid, side = self.encoder.grid_size, self.config.mask_grid
        return patches_of_cells(keep, grid, side), patches_of_cells(masked, grid, side)

    def predict(self, images: Tensor, keep: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruct all patches: (latent [b, 1 + R + k, D], prediction of every patch [b, N, p * p * C])."""
        latent = self.encoder(images, keep=keep)
        return latent, self.decoder.predict(self._without_registers(latent), keep, masked)

    def param_groups(self) -> list[ParamGroup]:
        further = self._further_class_tokens()

        def change(source: ParamGroup, moved: bool) -> param_groups.GroupChange:
            if not moved:
                return {}
            return {
                "name": f"{source['name']}_class_tokens",
                "lr_scale": 2 * source["lr_scale"],
                "weight_decay_scale": source["weight_decay_scale"] / 2,
            }

        return param_groups.divide(super().param_groups(), lambda name: name in further, change)

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
        hidden = patches.new_zeros(patches.shape[:2], dtype=torch.bool).scatter(1, masked, True)[..., None]
        grid = (images.shape[2] // self.encoder.patch_size, images.shape[3] // self.encoder.patch_size)
        columns = [patches, patches.masked_fill(hidden, float("nan")), torch.where(hidden, pred.float(), patches)]
        rows = [unpatchify(column, self.encoder.patch_size, grid) for column in columns]
        shown = [drawing.to_rgb(row, mean=mean, std=std) for row in rows]
        return {"input | masked | reconstruction": drawing.sheet(torch.stack(shown, dim=1))}

    def _further_class_tokens(self) -> dict[str, nn.Parameter]:
        """The registers that are class tokens, by name."""
        named = self.named_parameters() if self.config.registers_are_class_tokens else ()
        return {name: parameter for name, parameter in named if name.endswith("reg_token")}

    def _without_registers(self, latent: Tensor) -> Tensor:
        """Class tokens and patches, without registers: the decoder does not read them."""
        prefix = self.encoder.num_prefix_tokens
        return (
            latent if prefix == self.decoder.num_class_tokens else torch.cat([latent[:, :1], latent[:, prefix:]], dim=1)
        )
