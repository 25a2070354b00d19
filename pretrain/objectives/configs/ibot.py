"""Configuration of iBOT (Zhou et al. 2022, "iBOT: Image BERT Pre-Training with Online Tokenizer"). No torch here."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pretrain.core.configlib import Positive
from pretrain.data.views.masks import RatioBlockMask
from pretrain.data.views.specs import InputSpec
from pretrain.objectives.configs.checks import mask_problems
from pretrain.objectives.configs.self_distillation import SelfDistillationConfig
from pretrain.objectives.configs.shape import ModelShape, patch_grid
from pretrain.objectives.configs.values import Scale

Ratio = tuple[float, ...]


class IBOTConfig(SelfDistillationConfig):
    """Self-distillation of class token and masked patches (Zhou et al. 2022). Defaults: the official code's."""

    name: Literal["ibot"] = "ibot"
    out_dim: Positive = Field(8192, description="number of prototypes of the class token")
    patch_out_dim: Positive = Field(8192, description="number of patch prototypes; equal to out_dim if shared")
    shared_head: bool = Field(False, description="the student's patches use its class token's prototypes")
    shared_head_teacher: bool = Field(True, description="the same for the teacher")
    head_hidden_dim: Positive = 2048
    head_bottleneck_dim: Positive = 256
    head_nlayers: Positive = 3
    head_norm: Literal["none", "bn", "ln"] = Field(
        "none", description="one norm after every hidden layer of the head; bn reads all patches, masked or not"
    )
    head_act: Literal["gelu", "relu"] = "gelu"
    norm_last_layer: bool = Field(True, description="fix prototypes at length 1; false is better for small ViTs")
    teacher_temp: float = Field(0.04, gt=0)
    warmup_teacher_temp: float = Field(0.04, gt=0)
    teacher_patch_temp: float = Field(0.07, gt=0)
    warmup_teacher_patch_temp: float = Field(0.04, gt=0)
    warmup_teacher_temp_epochs: int = Field(30, ge=0)
    patch_center_momentum: float = Field(0.9, ge=0, lt=1)
    lambda1: float = Field(1.0, ge=0, description="weight of the class token's loss")
    lambda2: float = Field(1.0, ge=0, description="weight of the patches' loss")
    use_masked_im_modeling: bool = Field(
        True, description="the student sees a mask token in place of masked patches; false: it sees the patches"
    )
    pred_ratio: Ratio = Field((0.3,), description="fractions of a crop's patches to mask, one drawn per crop")
    pred_ratio_var: Ratio = Field((0.0,), description="half width of the range around each fraction")
    pred_shape: Literal["block", "rand"] = "block"
    pred_start_epoch: int = Field(0, ge=0, description="first epoch with masks")
    global_crops_scale: Scale = (0.14, 1.0)
    local_crops_number: int = Field(0, ge=0)

    needs: ClassVar[frozenset[str]] = frozenset({"image", "patches", "mask"})
    step_momenta: ClassVar[tuple[str, ...]] = ("momentum_teacher", "center_momentum", "patch_center_momentum")
    batch_coupled: ClassVar[tuple[str, ...]] = ("the teacher's temperatures were tuned for a batch of 1,024",)

    def mask(self, model: ModelShape) -> RatioBlockMask:
        """Mask of the two global crops.

        Raises:
            ValueError: the grid cannot hold it.
        """
        return RatioBlockMask(
            "mask",
            patch_grid(model),
            count=2,
            ratio=self.pred_ratio,
            ratio_var=self.pred_ratio_var,
            start_epoch=self.pred_start_epoch,
            shape=self.pred_shape,
        )

    def views(self, model: ModelShape) -> list[InputSpec]:
        """The crops of self-distillation, and the masks of the global ones."""
        return [*super().views(model), self.mask(model)]

    def problems(self, model: ModelShape) -> list[str]:
        found = super().problems(model) + mask_problems("pred_ratio", lambda: self.mask(model))
        if self.patch_out_dim != self.out_dim and (self.shared_head or self.shared_head_teacher):
            found.append(
                f"objective.patch_out_dim: {self.patch_out_dim}, but a shared head has {self.out_dim} for both; "
                "make them equal or set shared_head and shared_head_teacher to false"
            )
        if self.shared_head and not self.shared_head_teacher:
            found.append(
                "objective.shared_head_teacher: false with shared_head true never trains the teacher's patch "
                "prototypes; set it to true"
            )
        return found
