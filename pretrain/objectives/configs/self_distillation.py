"""What can be set about self-distillation with crops of two sizes: shared by DINO, iBOT and DINOv2. No torch here."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from pretrain.core.configlib import Positive
from pretrain.data.views.specs import Blur, ColorJitter, InputSpec, Noise, ViewSpec
from pretrain.objectives.configs.checks import scale_problems
from pretrain.objectives.configs.section import ObjectiveSection
from pretrain.objectives.configs.shape import ModelShape
from pretrain.objectives.configs.values import HueShift, Probability, Scale, Sigma, Strength


class SelfDistillationConfig(ObjectiveSection):
    """A student learns from its own average, which sees the global crops only (Caron et al. 2021)."""

    student_temp: float = Field(0.1, gt=0)
    center_momentum: float = Field(0.9, ge=0, lt=1)
    momentum_teacher: float = Field(0.996, ge=0, le=1, description="of the first step")
    final_momentum_teacher: float = Field(1.0, ge=0, le=1, description="where a cosine leads it")
    freeze_last_layer_epochs: int = Field(1, ge=0, description="epochs in which the prototypes stand still")
    drop_path_rate: float = Field(0.1, ge=0, lt=1, description="of the student; the teacher has none")
    pos_resize: Literal["exact", "dino"] = Field("dino", description="dino: as the released weights were trained")
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
    blur_prob: tuple[Probability, Probability, Probability] = Field(
        (1.0, 0.1, 0.5), description="of the first global crop, the second, the local crops"
    )
    blur_sigma: tuple[Sigma, Sigma] = Field((0.1, 2.0), description="pixels; less for images much below 224 px")
    solarize_prob: Probability = Field(0.2, description="of the second global crop")

    has_teacher: ClassVar[bool] = True
    step_momenta: ClassVar[tuple[str, ...]] = ("momentum_teacher", "center_momentum")

    @property
    def local_size(self) -> tuple[int, int]:
        """Height and width of the local crops in pixels."""
        return sides(self.local_crops_size)

    def views(self, model: ModelShape) -> list[InputSpec]:
        """Two global crops, the second solarized and seldom blurred, the local crops, the numbers of the drop path."""
        colour: dict[str, Any] = {
            "hflip": self.hflip,
            "jitter": ColorJitter(*self.color_jitter, prob=self.color_jitter_prob) if self.color_jitter_prob else None,
            "grayscale": self.grayscale_prob,
        }
        first, second, local = (Blur(prob, *self.blur_sigma) if prob else None for prob in self.blur_prob)
        size, scale = model.size, self.global_crops_scale
        views: list[InputSpec] = [
            ViewSpec("global", size, scale=scale, blur=first, **colour),
            ViewSpec("global", size, scale=scale, blur=second, solarize=self.solarize_prob, **colour),
        ]
        if self.local_crops_number:
            size, scale = self.local_size, self.local_crops_scale
            views.append(ViewSpec("local", size, scale=scale, count=self.local_crops_number, blur=local, **colour))
        if self.drop_path_rate:
            views.append(Noise("drop_path", (2 + self.local_crops_number, model.num_blocks, 2)))
        return views

    def problems(self, model: ModelShape) -> list[str]:
        found = scale_problems("global_crops_scale", self.global_crops_scale)
        found += scale_problems("local_crops_scale", self.local_crops_scale)
        found += scale_problems("blur_sigma", self.blur_sigma)
        colours = {
            "color_jitter": bool(self.color_jitter_prob and any(self.color_jitter[2:])),
            "grayscale_prob": bool(self.grayscale_prob),
        }
        found += [
            f"objective.{key}: needs RGB, but model.in_chans is {model.in_chans}; set {way_out}"
            for key, way_out in (("color_jitter", "its last two values to 0"), ("grayscale_prob", "it to 0"))
            if colours[key] and model.in_chans != 3
        ]
        if model.drop_path_rate:
            found.append(
                f"model.drop_path_rate: {model.drop_path_rate}, but the student takes objective.drop_path_rate; "
                "set that one"
            )
        return found


def sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels of a size given as a side or as both."""
    return size if isinstance(size, tuple) else (size, size)
