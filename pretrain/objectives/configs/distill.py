"""Configuration of distillation from frozen networks (Hinton et al. 2015; several: Ranzinger et al. 2024, "AM-RADIO";
Sariyildiz et al. 2024, "UNIC"). No torch here."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pretrain.core.configlib import Config, Positive
from pretrain.data.views.specs import ColorJitter, InputSpec, Noise, ViewSpec
from pretrain.objectives.configs import released
from pretrain.objectives.configs.checks import rgb_problems, scale_problems
from pretrain.objectives.configs.section import ObjectiveSection
from pretrain.objectives.configs.shape import ModelShape
from pretrain.objectives.configs.values import HueShift, Probability, Scale, Size, Strength, both_sides


class TeacherConfig(Config):
    """One frozen teacher, and what the student learns from it."""

    weights: str = Field(description="release folder, or file of ViT weights")
    size: Positive | tuple[Positive, Positive] | None = Field(
        None, description="of its images in pixels, a side or (height, width); default: model.img_size"
    )
    heads: Positive | None = Field(
        None,
        description="attention heads of a teacher from a file; default: as published; of other sizes it must be given",
    )
    class_weight: float = Field(1.0, ge=0, description="of its vector of the image")
    patch_weight: float | None = Field(
        None,
        ge=0,
        description="of its patches, resampled to the student's grid; default: 1, or 0 where one of the two has none",
    )
    gram_weight: float = Field(0.0, ge=0, description="of the similarities between its patches (DINOv3)")

    def weights_on(self, provides: frozenset[str]) -> dict[str, float]:
        """Of the terms, by name, where student and teacher both give what `provides` names."""
        patch = self.patch_weight if self.patch_weight is not None else float("patches" in provides)
        return {"class": self.class_weight, "patch": patch, "gram": self.gram_weight}


class DistillConfig(ObjectiveSection):
    """Features of one or several frozen teachers, into any backbone."""

    name: Literal["distill"] = "distill"
    teachers: tuple[TeacherConfig, ...] = Field(
        min_length=1, description="{weights, size, heads, class_weight, patch_weight, gram_weight} of each"
    )
    cosine_weight: float = Field(1.0, ge=0, description="of 1 - cosine of feature and target")
    smooth_l1_weight: float = Field(1.0, ge=0, description="of their smooth L1 distance, beta 1")
    statistics_steps: int = Field(
        500, ge=0, description="steps whose features give the mean and spread that targets are standardized by; 0: none"
    )
    adaptor_dim: Positive = Field(2048, description="hidden width of the networks from student to teacher")
    crop_scale: Scale = Field((0.2, 1.0), description="area of the crop as a fraction of the image")
    hflip: Probability = 0.5
    color_jitter: tuple[Strength, Strength, Strength, HueShift] = Field(
        (0.4, 0.4, 0.2, 0.1), description="brightness, contrast, saturation, hue; the last two need RGB"
    )
    color_jitter_prob: Probability = 0.8
    grayscale_prob: Probability = Field(0.2, description="needs RGB")

    needs: ClassVar[frozenset[str]] = frozenset({"image"})

    def views(self, model: ModelShape) -> list[InputSpec]:
        """One crop, the same at the size of each teacher, and random numbers of the drop path."""
        jitter = ColorJitter(*self.color_jitter, prob=self.color_jitter_prob) if self.color_jitter_prob else None
        specs: list[InputSpec] = [
            ViewSpec(
                "image",
                model.size,
                scale=self.crop_scale,
                hflip=self.hflip,
                jitter=jitter,
                grayscale=self.grayscale_prob,
            )
        ]
        for size in dict.fromkeys(teacher_size(teacher, model.size) for teacher in self.teachers):
            specs.append(ViewSpec(view_name(size), size, same_as="image", normalize=False))
        if model.drop_path_rate:
            specs.append(Noise("drop_path", (model.num_blocks, 2)))
        return specs

    def problems(self, model: ModelShape) -> list[str]:
        found = scale_problems("crop_scale", self.crop_scale)
        found += rgb_problems(self.color_jitter, self.color_jitter_prob, self.grayscale_prob, model)
        if not (self.cosine_weight or self.smooth_l1_weight):
            found.append("objective.cosine_weight: 0, and so is smooth_l1_weight; give one of them")
        for index, teacher in enumerate(self.teachers):
            key = f"teachers.{index}"
            weights = teacher.weights_on(model.provides)
            if not any(weights.values()):
                found.append(f"objective.{key}.class_weight: 0, and so are its other weights; leave the teacher out")
            if (weights["patch"] or weights["gram"]) and "patches" not in model.provides:
                found.append(
                    f"objective.{key}.patch_weight: the model gives one vector per image and no patches; set it and "
                    "gram_weight to 0, or choose another model (docs/backbones.md)"
                )
            facts = released.facts(teacher.weights)
            if facts is not None and facts["model"].get("in_chans", model.in_chans) != model.in_chans:
                found.append(
                    f"objective.{key}.weights: {teacher.weights} reads {facts['model']['in_chans']} channels, "
                    f"model.in_chans is {model.in_chans}"
                )
        return found


def teacher_size(teacher: TeacherConfig, size: Size) -> Size:
    """(height, width) in pixels of a teacher's images, for a student of `size`."""
    return size if teacher.size is None else both_sides(teacher.size)


def view_name(size: Size) -> str:
    """The batch entry of the teachers whose images have this size."""
    return f"teacher_{size[0]}x{size[1]}"
