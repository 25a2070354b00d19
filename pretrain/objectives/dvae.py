"""The discrete VAE: encode each patch of an image as one of K codes, and decode the image from the codes.

Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation", section 2.1, as BEiT's code trains it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.core.schedule import cosine
from pretrain.core.trainable import Batch
from pretrain.models.pictures import token_pictures
from pretrain.models.tokenizers.dvae import Codes, ConvEncoder, gumbel_softmax, kl_to_uniform, reconstruction_loss
from pretrain.models.tokenizers.quantizer import perplexity
from pretrain.objectives.base import Horizon, Objective, feature_std, images_of
from pretrain.objectives.configs.dvae import DVAEConfig


class DVAE(Objective[DVAEConfig]):
    """Batch: "image" [b, 1, C, H, W] and "gumbel_noise" [b, num_tokens, h, w], uniform random numbers."""

    head_prefixes = ("codes.",)

    def __init__(self, config: DVAEConfig, backbone: ConvEncoder, horizon: Horizon):
        super().__init__()
        self.config, self.horizon = config, horizon
        self.encoder = backbone
        self.codes = Codes(backbone, config.num_tokens, config.codebook_dim)

    @property
    def backbone(self) -> ConvEncoder:
        return self.encoder

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        config, images = self.config, images_of(batch, "image")
        features = self.encoder.map(images)
        logits = self.codes.to_logits(features)
        weights = self.choose(logits, batch["gumbel_noise"], step)
        loss_rec = reconstruction_loss(images, self.codes.decode_mixture(weights), smooth_l1=config.smooth_l1_loss)
        loss_kl = kl_to_uniform(logits)
        if config.kl_reduction == "mean":
            loss_kl = loss_kl / (logits.numel() // config.num_tokens)
        counts = torch.bincount(logits.detach().argmax(1).flatten(), minlength=config.num_tokens).float()
        return {
            "loss": loss_rec + config.kl_div_loss_weight * loss_kl,
            "loss_rec": loss_rec.detach(),
            "loss_kl": loss_kl.detach(),
            "codebook_perplexity": perplexity(counts),
            "codebook_used": (counts > 0).float().mean(),
            "feature_std": feature_std(features.flatten(2).mean(2)),
        }

    def choose(self, logits: Tensor, noise: Tensor, step: int) -> Tensor:
        """Gumbel-softmax over the codes: logits and uniform random numbers [b, K, h, w] -> weights [b, K, h, w]."""
        straight_through = self.config.straight_through
        return gumbel_softmax(logits, noise, temperature=self.temperature(step), straight_through=straight_through)

    def temperature(self, step: int) -> float:
        """Temperature of the Gumbel-softmax after `step` completed steps."""
        return cosine(step, self.config.temperature, self.config.temperature_end, self.horizon.total_steps)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Reconstruct normalized images [b, C, H, W] from their most likely codes."""
        return self.codes.decode(self.codes.to_logits(self.encoder.map(images)).argmax(1))

    @torch.no_grad()
    def pictures(
        self, batch: Batch, step: int, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> dict[str, Tensor]:
        """One row per image (8 at most): the input, and its reconstruction from its most likely codes."""
        images = images_of(batch, "image")[:8]
        sheet = token_pictures.pairs_sheet(images, self.reconstruct(images), mean=mean, std=std)
        return {"input | reconstruction": sheet}
