"""Configuration of the discrete VAE (Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation"). No torch here."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pretrain.core.configlib import Positive
from pretrain.data.views.specs import ColorJitter, InputSpec, Noise, ViewSpec
from pretrain.objectives.configs.checks import jitter_problems, scale_problems
from pretrain.objectives.configs.section import ObjectiveSection
from pretrain.objectives.configs.shape import ModelShape, patch_grid
from pretrain.objectives.configs.values import HueShift, Probability, Scale, Strength


class DVAEConfig(ObjectiveSection):
    """Discrete variational autoencoder: the tokenizer of BEiT."""

    name: Literal["dvae"] = "dvae"
    num_tokens: Positive = Field(512, description="number of codes; each patch draws one random number per code")
    codebook_dim: Positive = 512
    temperature: float = Field(0.9, gt=0, description="of the Gumbel-softmax at the first step")
    temperature_end: float = Field(0.9, gt=0, description="at the last step, after a half-cosine schedule")
    straight_through: bool = Field(False, description="decode one code, with the gradient of the soft sample")
    smooth_l1_loss: bool = Field(False, description="smooth L1 instead of squared error of pixels")
    kl_div_loss_weight: float = Field(0.0, ge=0, description="weight of KL(codes || uniform distribution)")
    kl_reduction: Literal["sum", "mean"] = Field(
        "sum",
        description="sum: over a micro-batch and its patches, as in the official code; mean: per patch, independent "
        "of the division of the batch",
    )
    crop_scale: Scale = Field((0.08, 1.0), description="area of the crop as a fraction of the image")
    hflip: Probability = 0.5
    color_jitter: tuple[Strength, Strength, Strength, HueShift] = Field(
        (0.0, 0.0, 0.0, 0.0), description="brightness, contrast, saturation, hue; the last two need RGB"
    )

    needs: ClassVar[frozenset[str]] = frozenset({"conv_map"})

    def views(self, model: ModelShape) -> list[InputSpec]:
        """One crop, and the random numbers of the Gumbel-softmax at every patch."""
        jitter = ColorJitter(*self.color_jitter) if any(self.color_jitter) else None
        return [
            ViewSpec("image", model.size, scale=self.crop_scale, hflip=self.hflip, jitter=jitter),
            Noise("gumbel_noise", (self.num_tokens, *patch_grid(model))),
        ]

    def problems(self, model: ModelShape) -> list[str]:
        found = scale_problems("crop_scale", self.crop_scale)
        found += jitter_problems(self.color_jitter, model)
        return found
