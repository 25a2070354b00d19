"""Configuration of data2vec for images (Baevski et al. 2022, "data2vec: A General Framework ..."). No torch here."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pretrain.core.configlib import Positive
from pretrain.data.views.masks import BlockMask
from pretrain.data.views.specs import ColorJitter, InputSpec, Noise, ViewSpec
from pretrain.objectives.configs.checks import jitter_problems, mask_problems, scale_problems
from pretrain.objectives.configs.section import ObjectiveSection
from pretrain.objectives.configs.shape import ModelShape, patch_grid
from pretrain.objectives.configs.values import Probability, Scale, Strength


class Data2VecConfig(ObjectiveSection):
    """Masked prediction of the EMA teacher's averaged layers (Baevski et al. 2022)."""

    name: Literal["data2vec"] = "data2vec"
    num_mask_patches: Positive = Field(120, description="masked patches of an image; the paper: 120 of 196")
    min_mask_patches_per_block: Positive = 16
    max_mask_patches_per_block: Positive = 196
    exact_mask_count: bool = Field(
        False, description="true: exactly num_mask_patches; false: at most that many, as officially"
    )
    num_target_layers: Positive = Field(6, description="last blocks of the teacher whose tokens are averaged")
    target_features: Literal["block", "ffn"] = "block"
    target_norm: Literal["layer", "instance", "none"] = Field("layer", description="normalization of each layer")
    final_norm: Literal["layer", "instance", "none"] = Field("layer", description="normalization of their mean")
    loss_beta: float = Field(2.0, gt=0, description="error where the smooth L1 loss becomes linear")
    ema_start: Probability = Field(0.999, description="EMA momentum at the start of its ramp")
    ema_end: Probability = 0.9998
    ema_anneal_epochs: float = Field(0, ge=0, description="length of the ramp; 0, as officially run: always ema_end")
    crop_scale: Scale = Field((0.08, 1.0), description="area of the crop as a fraction of the image")
    hflip: Probability = 0.5
    color_jitter: tuple[Strength, Strength, Strength] = Field(
        (0.4, 0.4, 0.4), description="brightness, contrast, saturation; the last needs RGB"
    )

    has_teacher: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"patches", "mask", "layers"})
    step_momenta: ClassVar[tuple[str, ...]] = ("ema_start", "ema_end")

    def views(self, model: ModelShape) -> list[InputSpec]:
        """One crop, its mask, and random numbers of the drop path."""
        jitter = ColorJitter(*self.color_jitter) if any(self.color_jitter) else None
        specs: list[InputSpec] = [
            ViewSpec("image", model.size, scale=self.crop_scale, hflip=self.hflip, jitter=jitter),
            self.mask(model),
        ]
        if model.drop_path_rate:
            specs.append(Noise("drop_path", (model.num_blocks, 2)))
        return specs

    def mask(self, model: ModelShape) -> BlockMask:
        """Batch entry "mask"."""
        return BlockMask(
            "mask",
            patch_grid(model),
            num_masked=self.num_mask_patches,
            min_per_block=self.min_mask_patches_per_block,
            max_per_block=self.max_mask_patches_per_block,
            exact=self.exact_mask_count,
        )

    def problems(self, model: ModelShape) -> list[str]:
        found = scale_problems("crop_scale", self.crop_scale)
        found += jitter_problems((*self.color_jitter, 0.0), model)
        if self.num_target_layers > model.num_blocks:
            found.append(
                f"objective.num_target_layers: {self.num_target_layers} of a backbone with {model.num_blocks} blocks; "
                "at most that many"
            )
        return found + mask_problems("num_mask_patches", lambda: self.mask(model))
