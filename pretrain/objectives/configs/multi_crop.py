"""Settings of crops of two sizes: global crops and several local ones, which may be small. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from pretrain.core.configlib import Positive
from pretrain.data.views.specs import Blur, ColorJitter, InputSpec, Noise, ViewSpec
from pretrain.objectives.configs.checks import rgb_problems, scale_problems
from pretrain.objectives.configs.section import ObjectiveSection
from pretrain.objectives.configs.shape import ModelShape
from pretrain.objectives.configs.values import HueShift, Probability, Scale, Sigma, Strength, both_sides


class CropsConfig(ObjectiveSection):
    """Crops of two sizes and their colours; a subclass specifies the views. It may have a teacher or none."""

    global_crops_scale: Scale = (0.4, 1.0)
    local_crops_number: int = Field(8, ge=0)
    local_crops_scale: Scale = (0.05, 0.4)
    local_crops_size: Positive | tuple[Positive, Positive] = Field(96, description="pixels, a side or (height, width)")
    hflip: Probability = 0.5
    color_jitter: tuple[Strength, Strength, Strength, HueShift] = Field(
        (0.4, 0.4, 0.2, 0.1), description="brightness, contrast, saturation, hue; the last two need RGB"
    )
    color_jitter_prob: Probability = 0.8
    grayscale_prob: Probability = Field(0.2, description="needs RGB")
    blur_sigma: tuple[Sigma, Sigma] = Field((0.1, 2.0), description="pixels; less for images much below 224 px")

    @property
    def num_global(self) -> int:
        """Global crops of an image."""
        return 2

    @property
    def local_size(self) -> tuple[int, int]:
        """Height and width of the local crops in pixels."""
        return both_sides(self.local_crops_size)

    def crops_drop_path(self, model: ModelShape) -> float:
        """Drop path rate of the student, or of the only network."""
        return model.drop_path_rate

    def crops(self, model: ModelShape, colours: Sequence[dict[str, Any]], local: dict[str, Any]) -> list[InputSpec]:
        """A global crop for each of `colours`, the local crops, and the drop path's random numbers.

        Batch entries: "global" [b, g, C, H, W], "local" [b, n, C, h, w], "drop_path" [b, g + n, depth, 2]. `colours`
        and `local` are what the kinds of crops add to the colours that all have.
        """
        shared: dict[str, Any] = {
            "hflip": self.hflip,
            "jitter": ColorJitter(*self.color_jitter, prob=self.color_jitter_prob) if self.color_jitter_prob else None,
            "grayscale": self.grayscale_prob,
        }
        size, scale, count = model.size, self.global_crops_scale, self.local_crops_number
        views: list[InputSpec] = [ViewSpec("global", size, scale=scale, **shared, **own) for own in colours]
        if count:
            size, scale = self.local_size, self.local_crops_scale
            views.append(ViewSpec("local", size, scale=scale, count=count, **shared, **local))
        if self.crops_drop_path(model):
            views.append(Noise("drop_path", (self.num_global + count, model.num_blocks, 2)))
        return views

    def blur(self, prob: float) -> Blur | None:
        """Blur with this probability."""
        return Blur(prob, *self.blur_sigma) if prob else None

    def problems(self, model: ModelShape) -> list[str]:
        return [
            *scale_problems("global_crops_scale", self.global_crops_scale),
            *scale_problems("local_crops_scale", self.local_crops_scale),
            *scale_problems("blur_sigma", self.blur_sigma),
            *rgb_problems(self.color_jitter, self.color_jitter_prob, self.grayscale_prob, model),
        ]


class MultiCropConfig(CropsConfig):
    """DINO's crops (Caron et al. 2021): two global ones, the second solarized and rarely blurred, and local ones."""

    blur_prob: tuple[Probability, Probability, Probability] = Field(
        (1.0, 0.1, 0.5), description="of the first global crop, the second, and local crops"
    )
    solarize_prob: Probability = Field(0.2, description="of the second global crop")

    def views(self, model: ModelShape) -> list[InputSpec]:
        """See `crops`."""
        first, second, local = (self.blur(prob) for prob in self.blur_prob)
        return self.crops(model, [{"blur": first}, {"blur": second, "solarize": self.solarize_prob}], {"blur": local})
