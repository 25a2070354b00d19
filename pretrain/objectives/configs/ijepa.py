"""Configuration of I-JEPA (Assran et al. 2023, "Self-Supervised Learning from Images with a JEPA"). No torch here."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pretrain.core.configlib import Positive
from pretrain.data.views.masks import MultiBlockMask
from pretrain.data.views.specs import InputSpec, Noise, ViewSpec
from pretrain.objectives.configs.checks import mask_problems, scale_problems
from pretrain.objectives.configs.section import ObjectiveSection
from pretrain.objectives.configs.shape import ModelShape, patch_grid
from pretrain.objectives.configs.values import Probability, Scale


class IJEPAConfig(ObjectiveSection):
    """Joint-embedding prediction of target blocks from a context block (Assran et al. 2023)."""

    name: Literal["ijepa"] = "ijepa"
    predictor_embed_dim: Positive = 384
    predictor_depth: Positive = 12
    predictor_num_heads: Positive | None = Field(None, description="default: those of the encoder")
    num_contexts: Positive = Field(1, description="context blocks of an image, each encoded separately")
    context_scale: Scale = Field((0.85, 1.0), description="area of a context block as a fraction of the grid")
    num_targets: Positive = Field(4, description="target blocks of an image, each predicted separately")
    target_scale: Scale = Field((0.15, 0.2), description="area of a target block as a fraction of the grid")
    target_aspect: tuple[float, float] = Field((0.75, 1.5), description="height / width of the target blocks")
    min_keep: int = Field(10, ge=0, description="blocks have more patches than this")
    allow_overlap: bool = Field(False, description="contexts may contain target patches")
    ema_start: Probability = Field(0.996, description="EMA momentum of the first step; linear to ema_end")
    ema_end: Probability = 1.0
    ema_length: float = Field(1.0, gt=0, description="length of that ramp in runs (official: ipe_scale)")
    crop_scale: Scale = Field((0.3, 1.0), description="area of the crop as a fraction of the image")
    hflip: Probability = 0.0

    has_teacher: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"patches", "keep"})
    step_momenta: ClassVar[tuple[str, ...]] = ("ema_start", "ema_end")
    batch_coupled: ClassVar[tuple[str, ...]] = (
        "blocks are cut to the shortest of the global batch: contexts shrink as the batch grows",
    )

    def views(self, model: ModelShape) -> list[InputSpec]:
        """One crop, the patches of its contexts and targets, and random numbers of the drop path."""
        specs: list[InputSpec] = [
            ViewSpec("image", model.size, scale=self.crop_scale, hflip=self.hflip, interpolation="bilinear"),
            self.mask(model),
        ]
        if model.drop_path_rate:
            specs.append(Noise("drop_path", (model.num_blocks, 2)))
        return specs

    def mask(self, model: ModelShape) -> MultiBlockMask:
        """Batch entries "mask_context" and "mask_targets"."""
        return MultiBlockMask(
            "mask",
            patch_grid(model),
            context_scale=self.context_scale,
            target_scale=self.target_scale,
            aspect=self.target_aspect,
            num_targets=self.num_targets,
            num_contexts=self.num_contexts,
            min_keep=self.min_keep,
            allow_overlap=self.allow_overlap,
        )

    def problems(self, model: ModelShape) -> list[str]:
        found = scale_problems("crop_scale", self.crop_scale)
        found += scale_problems("context_scale", self.context_scale)
        found += scale_problems("target_scale", self.target_scale)
        found += scale_problems("target_aspect", self.target_aspect)
        if model.class_token:
            found.append(
                "model.class_token: true, but I-JEPA predicts patches and trains no class token; set it to false"
            )
        if self.predictor_embed_dim % 4 or self.predictor_embed_dim % (self.predictor_num_heads or 1):
            found.append(
                f"objective.predictor_embed_dim: {self.predictor_embed_dim} is not a multiple of 4 and of "
                f"predictor_num_heads {self.predictor_num_heads}"
            )
        return found + (mask_problems("min_keep", lambda: self.mask(model)) if not found else [])
