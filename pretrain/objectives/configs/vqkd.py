"""Configuration of VQ-KD (Peng et al. 2022, "BEiT v2", section 2.1). No torch here."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pretrain.core.configlib import Positive
from pretrain.data.views.specs import ColorJitter, InputSpec, Noise, ViewSpec
from pretrain.objectives.configs import released
from pretrain.objectives.configs.checks import jitter_problems, scale_problems
from pretrain.objectives.configs.section import ObjectiveSection
from pretrain.objectives.configs.shape import ModelShape, num_patches, patch_grid
from pretrain.objectives.configs.values import HueShift, Probability, Scale, Strength, both_sides


class VQKDConfig(ObjectiveSection):
    """Vector-quantized knowledge distillation: the tokenizer of BEiT v2."""

    name: Literal["vqkd"] = "vqkd"
    teacher: str = Field(description="release folder, or file of ViT weights; its patch features are the targets")
    teacher_size: Positive | tuple[Positive, Positive] | None = Field(
        None, description="size of the teacher's input in pixels; default: the size with one feature per patch"
    )
    teacher_heads: Positive | None = Field(
        None,
        description="attention heads of a teacher from a file; default: as published; of other sizes it must be given",
    )
    num_codes: Positive = 8192
    code_dim: Positive = 32
    decay: float = Field(0.99, ge=0, lt=1, description="EMA decay of the codes")
    beta: float = Field(1.0, ge=0, description="weight of the commitment loss")
    kmeans_init: bool = Field(True, description="initialize codes by k-means on the first batch")
    decoder_embed_dim: Positive = 768
    decoder_depth: Positive = 3
    decoder_num_heads: Positive = 12
    decoder_mlp_ratio: float = Field(4.0, gt=0)
    crop_scale: Scale = Field((0.08, 1.0), description="area of the crop as a fraction of the image")
    hflip: Probability = 0.5
    color_jitter: tuple[Strength, Strength, Strength, HueShift] = Field(
        (0.0, 0.0, 0.0, 0.0), description="brightness, contrast, saturation, hue; the last two need RGB"
    )

    needs: ClassVar[frozenset[str]] = frozenset({"patches"})
    step_momenta: ClassVar[tuple[str, ...]] = ("decay",)

    def picture_size(self, grid: tuple[int, int], patch_size: int) -> tuple[int, int]:
        """(height, width) in pixels of the teacher's input, for a model of `grid` patches of `patch_size`."""
        if self.teacher_size is not None:
            return both_sides(self.teacher_size)
        found = released.facts(self.teacher)
        stride = (released.patch_size(found) if found else None) or patch_size
        return grid[0] * stride, grid[1] * stride

    def views(self, model: ModelShape) -> list[InputSpec]:
        """One crop, the same at the teacher's size, and random numbers of k-means and of the drop path."""
        jitter = ColorJitter(*self.color_jitter) if any(self.color_jitter) else None
        specs: list[InputSpec] = [
            ViewSpec("image", model.size, scale=self.crop_scale, hflip=self.hflip, jitter=jitter),
            ViewSpec(
                "teacher_image",
                self.picture_size(patch_grid(model), model.patch_size),
                same_as="image",
                normalize=False,
            ),
        ]
        if self.kmeans_init:
            specs.append(Noise("kmeans_noise", (num_patches(model),)))
        if model.drop_path_rate:
            specs.append(Noise("drop_path", (model.num_blocks, 2)))
        return specs

    def problems(self, model: ModelShape) -> list[str]:
        found = scale_problems("crop_scale", self.crop_scale)
        if self.decoder_embed_dim % self.decoder_num_heads:
            found.append(
                f"objective.decoder_num_heads: {self.decoder_num_heads} does not divide decoder_embed_dim "
                f"{self.decoder_embed_dim}"
            )
        found += jitter_problems(self.color_jitter, model)
        facts = released.facts(self.teacher)
        if facts is None:
            return found
        grid = patch_grid(model)
        found += released.grid_problems("teacher", self.teacher, facts, grid, model.in_chans, fixed=False)
        stride, size = released.patch_size(facts), self.picture_size(grid, model.patch_size)
        if stride and size != (grid[0] * stride, grid[1] * stride):
            found.append(
                f"objective.teacher_size: {size[0]} x {size[1]} px and patches of {stride} px do not give the model's "
                f"{grid[0]} x {grid[1]} patches; leave it out, or set [{grid[0] * stride}, {grid[1] * stride}]"
            )
        return found
