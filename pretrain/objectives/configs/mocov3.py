"""Configuration of MoCo v3 (Chen et al. 2021, "An Empirical Study of Training Self-Supervised Vision Transformers").

No torch here.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from pretrain.core.configlib import Positive
from pretrain.data.views.specs import Blur, ColorJitter, InputSpec, Noise, ViewSpec
from pretrain.objectives.configs.checks import rgb_problems, scale_problems
from pretrain.objectives.configs.section import ObjectiveSection
from pretrain.objectives.configs.shape import ModelShape
from pretrain.objectives.configs.values import HueShift, Probability, Scale, Sigma, Strength


class MoCoV3Config(ObjectiveSection):
    """Contrastive learning with two views and a momentum encoder (Chen et al. 2021)."""

    name: Literal["mocov3"] = "mocov3"
    projection_dim: Positive = 256
    hidden_dim: Positive = Field(4096, description="hidden width of projector and predictor")
    projector_layers: Positive = Field(3, description="2 for ResNet-50")
    predictor_layers: Positive = 2
    predictor_last_norm: bool = Field(True, description="batch norm after the predictor; false for ResNet-50")
    temperature: float = Field(0.2, gt=0, description="1.0 for ResNet-50")
    momentum: float = Field(0.99, ge=0, le=1, description="EMA momentum of the first step")
    momentum_cosine: bool = Field(True, description="cosine schedule of momentum to 1; false: constant")
    sync_bn: bool = Field(True, description="batch norm over all ranks; false: per rank")
    freeze_patch_embed: bool = Field(True, description="freeze the patch embedding of a ViT")
    crop_scale: Scale = Field((0.08, 1.0), description="area of the crops as a fraction; (0.2, 1.0) for ResNet-50")
    hflip: Probability = 0.5
    color_jitter: tuple[Strength, Strength, Strength, HueShift] = Field(
        (0.4, 0.4, 0.2, 0.1), description="brightness, contrast, saturation, hue; the last two need RGB"
    )
    color_jitter_prob: Probability = 0.8
    grayscale_prob: Probability = Field(0.2, description="needs RGB")
    blur_prob: tuple[Probability, Probability] = Field((1.0, 0.1), description="of the first and second view")
    blur_sigma: tuple[Sigma, Sigma] = Field((0.1, 2.0), description="pixels; less for images much below 224 px")
    solarize_prob: Probability = Field(0.2, description="of the second view")

    has_teacher: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"image"})
    step_momenta: ClassVar[tuple[str, ...]] = ("momentum",)
    batch_coupled: ClassVar[tuple[str, ...]] = (
        "negatives are the keys of the same micro-batch on all ranks: accumulation adds none",
        "batch norm of the heads uses the statistics of one micro-batch",
    )

    def views(self, model: ModelShape) -> list[InputSpec]:
        """Two views, the second solarized and rarely blurred, and with drop path its random numbers."""
        colour: dict[str, Any] = {
            "scale": self.crop_scale,
            "interpolation": "bilinear",
            "hflip": self.hflip,
            "jitter": ColorJitter(*self.color_jitter, prob=self.color_jitter_prob) if self.color_jitter_prob else None,
            "grayscale": self.grayscale_prob,
        }
        first, second = (Blur(prob, *self.blur_sigma) if prob else None for prob in self.blur_prob)
        views: list[InputSpec] = [
            ViewSpec("views", model.size, blur=first, **colour),
            ViewSpec("views", model.size, blur=second, solarize=self.solarize_prob, **colour),
        ]
        if model.drop_path_rate:
            views.append(Noise("drop_path", (2, model.num_blocks, 2)))
        return views

    def problems(self, model: ModelShape) -> list[str]:
        return [
            *scale_problems("crop_scale", self.crop_scale),
            *scale_problems("blur_sigma", self.blur_sigma),
            *rgb_problems(self.color_jitter, self.color_jitter_prob, self.grayscale_prob, model),
        ]

    def batch_problems(self, micro_batch: int, world_size: int) -> list[str]:
        together = micro_batch * (world_size if self.sync_bn else 1)
        if together >= 2:
            return []
        return [
            f"objective.sync_bn: {str(self.sync_bn).lower()} leaves {together} image per batch norm, without "
            "negatives; raise optim.global_batch_size or lower engine.accumulation_steps to have at least 2"
        ]
