"""VideoMAE: mask the same patches in all frames of a clip, encode the others, predict the pixels of the masked tubes.

Tong et al. 2022, "VideoMAE: Masked Autoencoders are Data-Efficient Learners for Self-Supervised Video Pre-Training",
section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.core.trainable import Batch
from pretrain.models.backbones.video import VideoViT
from pretrain.models.heads.mae_decoder import MAEDecoder
from pretrain.models.layers.patches import gather_tubes, split_by_noise, tubes_of_patches, unpatchify
from pretrain.models.layers.pos_embed import sincos_flat
from pretrain.models.pictures import drawing
from pretrain.objectives.base import Horizon, Objective, feature_std
from pretrain.objectives.configs.videomae import VideoMAEConfig

EPS = 1e-6  # added to the deviation of a target's colour


class VideoMAE(Objective[VideoMAEConfig]):
    """Batch: "clip" [b, T, C, H, W], "pixels" the same in [0, 1], and "mask_noise" [b, N] of the N patches of a frame,
    whose smallest numbers mark the visible ones; with drop path its uniform random numbers "drop_path" [b, depth, 2].
    """

    head_prefixes = ("decoder.",)

    def __init__(self, config: VideoMAEConfig, backbone: VideoViT, horizon: Horizon):
        super().__init__()
        self.config = config
        self.encoder = backbone
        tubes = backbone.grid_size[0] * backbone.grid_size[1]
        self.decoder = MAEDecoder(
            in_dim=backbone.embed_dim,
            embed_dim=config.decoder_embed_dim,
            depth=config.decoder_depth,
            num_heads=config.decoder_num_heads,
            out_dim=backbone.tubelet_size * backbone.patch_size**2 * backbone.in_chans,
            positions=sincos_flat(config.decoder_embed_dim, tubes),
            mlp_ratio=backbone.mlp_ratio,
            num_class_tokens=0,
            embed_bias=False,
            block={"qkv_bias": backbone.qkv_bias, "qk_scale": backbone.qk_scale, "layer_scale": backbone.layer_scale}
            | {"norm_eps": backbone.norm_eps},
        )
        torch.nn.init.trunc_normal_(self.decoder.mask_token, std=0.02, a=-0.02, b=0.02)

    @property
    def backbone(self) -> VideoViT:
        return self.encoder

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        keep, masked = self.split(batch["mask_noise"])
        latent = self.encoder(batch["clip"], keep=keep, drop=batch.get("drop_path"))
        latent = latent[:, self.encoder.num_prefix_tokens :]
        pred = self.decoder(latent, keep, masked).float()
        return {
            "loss": (pred - self.target(batch["pixels"], masked)).square().mean(),
            "feature_std": feature_std(latent.mean(dim=1)),
            "pred_std": pred.detach().std(),
        }

    def split(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of visible and masked tubes from the noise of the patches: int64 [b, k] and [b, N - k], the same
        patches at all times."""
        slices, total = self.encoder.slices, noise.shape[1]
        keep, masked = split_by_noise(noise, self.config.num_keep(total))
        return tubes_of_patches(keep, slices, total), tubes_of_patches(masked, slices, total)

    def target(self, pixels: Tensor, masked: Tensor | None = None) -> Tensor:
        """What is predicted of tubes of clips in [0, 1], [b, m, t * p * p * C], channels fastest; of all without
        `masked`."""
        tubes = self._tubes(pixels, masked)
        if self.config.norm_pix_loss:
            mean, std = _colours(tubes)
            tubes = (tubes - mean) / std
        return tubes.flatten(2)

    @torch.no_grad()
    def pictures(
        self, batch: Batch, step: int, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> dict[str, Tensor]:
        """A row per clip (8 at most), of its middle: the frame, its visible patches, these with the reconstruction."""
        clips, pixels, noise = (batch[name][:8] for name in ("clip", "pixels", "mask_noise"))
        keep, masked = self.split(noise)
        latent = self.encoder(clips, keep=keep)[:, self.encoder.num_prefix_tokens :]
        tubes = self._tubes(pixels)
        pred = self.decoder.predict(latent, keep, masked).float().view_as(tubes)
        if self.config.norm_pix_loss:
            of_mean, of_std = _colours(tubes)
            pred = pred * of_std + of_mean
        hidden = tubes.new_zeros(tubes.shape[:2], dtype=torch.bool).scatter(1, masked, True)[..., None, None]
        columns = [tubes, tubes.masked_fill(hidden, float("nan")), torch.where(hidden, pred, tubes)]
        shown = [
            drawing.to_rgb(self._middle(column), mean=(0.0,) * len(mean), std=(1.0,) * len(std)) for column in columns
        ]
        return {"input | masked | reconstruction": drawing.sheet(torch.stack(shown, dim=1))}

    def _tubes(self, pixels: Tensor, index: Tensor | None = None) -> Tensor:
        """The values of tubes by pixel and colour, [b, k, t * p * p, C]."""
        tubes = gather_tubes(pixels, self.encoder.tubelet_size, self.encoder.patch_size, index)
        return tubes.permute(0, 1, 3, 4, 5, 2).flatten(2, 4).float()

    def _middle(self, tubes: Tensor) -> Tensor:
        """The first frame of the middle tubes of [b, N, t * p * p, C], [b, C, H, W]."""
        patch, grid = self.encoder.patch_size, self.encoder.frame_grid
        at_one_time: Tensor = tubes.chunk(self.encoder.slices, dim=1)[self.encoder.slices // 2]
        return unpatchify(at_one_time[:, :, : patch**2].flatten(2), patch, grid)


def _colours(tubes: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased deviation of each colour of tubes [..., values, C], [..., 1, C]."""
    return tubes.mean(dim=-2, keepdim=True), tubes.std(dim=-2, keepdim=True) + EPS
