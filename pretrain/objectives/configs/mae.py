"""Configuration of MAE (He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners"). No torch here."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pretrain.core.configlib import Positive
from pretrain.data.views.specs import InputSpec, Noise, ViewSpec
from pretrain.objectives.configs.checks import scale_problems
from pretrain.objectives.configs.section import ObjectiveSection
from pretrain.objectives.configs.shape import ModelShape, num_patches
from pretrain.objectives.configs.values import Probability, Scale


class MAEConfig(ObjectiveSection):
    """Masked autoencoder (He et al. 2021)."""

    name: Literal["mae"] = "mae"
    mask_ratio: float = Field(0.75, gt=0, lt=1, description="fraction of patches that are masked")
    norm_pix_loss: bool = Field(True, description="normalize each target patch by its own mean and variance")
    decoder_embed_dim: Positive = 512
    decoder_depth: Positive = 8
    decoder_num_heads: Positive = 16
    crop_scale: Scale = Field((0.2, 1.0), description="area of the crop as a fraction of the image")
    hflip: Probability = 0.5

    needs: ClassVar[frozenset[str]] = frozenset({"patches", "class_token", "keep"})

    def num_keep(self, total: int) -> int:
        """Patches the encoder sees, of `total`."""
        return int(total * (1 - self.mask_ratio))

    def views(self, model: ModelShape) -> list[InputSpec]:
        """One crop, one random number per patch, by whose order patches are masked, and those of the drop path."""
        image = ViewSpec("image", model.size, scale=self.crop_scale, hflip=self.hflip)
        noises = [Noise("mask_noise", (num_patches(model),))]
        if model.drop_path_rate:
            noises.append(Noise("drop_path", (model.num_blocks, 2)))
        return [image, *noises]

    def problems(self, model: ModelShape) -> list[str]:
        found, total = scale_problems("crop_scale", self.crop_scale), num_patches(model)
        if not 1 <= self.num_keep(total) < total:
            found.append(
                f"objective.mask_ratio: {self.mask_ratio} of {total} patches leaves {self.num_keep(total)} visible; "
                "at least one must be visible and one masked"
            )
        width, heads = self.decoder_embed_dim, self.decoder_num_heads
        if width % 4 or width % heads:
            found.append(
                f"objective.decoder_embed_dim: {width} is not a multiple of 4 and of decoder_num_heads {heads}"
            )
        return found
