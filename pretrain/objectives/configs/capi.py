"""Configuration of CAPI (Darcet et al. 2025, "Cluster and Predict Latent Patches for Improved Masked Image Modeling").
No torch here."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pretrain.core.configlib import Positive
from pretrain.data.views.masks import PartMask
from pretrain.data.views.specs import InputSpec, Noise, ViewSpec
from pretrain.objectives.configs.checks import mask_problems, scale_problems
from pretrain.objectives.configs.section import ObjectiveSection
from pretrain.objectives.configs.shape import ModelShape, patch_grid
from pretrain.objectives.configs.values import Probability, Scale


class CAPIConfig(ObjectiveSection):
    """Prediction of the cluster that the EMA teacher's feature of a hidden patch belongs to (Darcet et al. 2025)."""

    name: Literal["capi"] = "capi"
    num_clusters: int = Field(16384, ge=2)
    student_temp: float = Field(0.12, gt=0, description="of the predicted clusters of hidden patches")
    teacher_temp: float = Field(0.06, gt=0, description="of the assignments, which Sinkhorn-Knopp balances")
    clustering_temp: float = Field(0.12, gt=0, description="of the clusters that the clustering layer itself predicts")
    sinkhorn_iterations: Positive = 3
    positionwise: bool = Field(
        True, description="assignments are balanced at each position; false: over all patches, where clusters may come "
        "to stand for positions"
    )  # fmt: skip
    clustering_bias: bool = True
    clustering_lr_scale: float = Field(0.5, gt=0, description="learning rate of the clustering layer, times optim.lr")
    clustering_decay_scale: float = Field(0.1, ge=0, description="its weight decay, times optim.weight_decay")
    predictor_embed_dim: Positive | None = Field(None, description="default: that of the encoder")
    predictor_depth: Positive = 12
    predictor_num_heads: Positive | None = Field(None, description="default: those of the encoder")
    final_norm_weights: bool = Field(False, description="train the weights of the last norms; false: they stay 1")
    mask_ratio: Probability = Field(0.65, description="fraction of patches hidden from the encoder")
    mask_shape: Literal["inverse_block", "block", "random"] = Field(
        "inverse_block", description="the visible patches are one block; the hidden ones are; single patches"
    )
    mask_aspect: tuple[float, float] = Field((0.5, 2.0), description="height / width of that block, as far as it fits")
    mask_roll: bool = Field(True, description="the block is shifted around the edges at random")
    predicted_ratio: Probability = Field(0.05, description="fraction of the hidden patches that are predicted")
    momentum_teacher: Probability = Field(0.999, description="EMA momentum after its warm-up from 1")
    final_momentum_teacher: Probability = Field(1.0, description="the end of the momentum's cosine")
    momentum_warmup: Probability = Field(0.1, description="part of the run in which the momentum falls from 1")
    momentum_share: float = Field(0.8, gt=0, le=1, description="part of the momentum's cosine that the run passes")
    norm_decay_scale: float = Field(0.1, ge=0, description="weight decay of the norms' weights, as a multiple")
    patch_embed_lr_mult: float = Field(0.2, gt=0)
    frequencies_lr_mult: float = Field(
        0.0, ge=0, description="learning rate of the positions' frequencies, as a multiple; 0: fixed"
    )
    drop_path_rate: float = Field(0.2, ge=0, lt=1, description="of all blocks of encoder and predictor alike")
    drop_path_subset: bool = Field(
        True, description="compute a branch for a fixed fraction of the micro-batch only; false: drop per sample"
    )
    crop_scale: Scale = Field((0.6, 1.0), description="area of the crop as a fraction of the image")
    hflip: Probability = 0.5

    has_teacher: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"patches", "keep"})
    step_momenta: ClassVar[tuple[str, ...]] = ("momentum_teacher", "final_momentum_teacher")
    batch_coupled: ClassVar[tuple[str, ...]] = (
        "Sinkhorn-Knopp balances the clusters over the images of a step at each position: with fewer images than "
        "clusters an image is assigned to several; num_clusters 16,384 goes with batches of 16,384",
    )

    def views(self, model: ModelShape) -> list[InputSpec]:
        """One crop, its visible and its predicted patches, and random numbers of the drop path."""
        specs: list[InputSpec] = [ViewSpec("image", model.size, scale=self.crop_scale, hflip=self.hflip)]
        specs.append(self.mask(model))
        if self.drop_path_rate:
            specs.append(Noise("drop_path", (model.num_blocks + self.predictor_depth, 2)))
        return specs

    def mask(self, model: ModelShape) -> PartMask:
        """Batch entries "mask_visible" and "mask_predicted"."""
        return PartMask(
            "mask",
            patch_grid(model),
            mask_ratio=self.mask_ratio,
            predicted=self.predicted_ratio,
            shape=self.mask_shape,
            aspect=self.mask_aspect,
            roll=self.mask_roll,
        )

    def problems(self, model: ModelShape) -> list[str]:
        found = scale_problems("crop_scale", self.crop_scale) + mask_problems("mask_ratio", lambda: self.mask(model))
        if model.drop_path_rate:
            found.append(
                f"model.drop_path_rate: {model.drop_path_rate}, but the student uses objective.drop_path_rate; "
                "set that instead"
            )
        if self.drop_path_subset and "own_blocks" not in model.provides:
            found.append("objective.drop_path_subset: true needs a ViT of Fovea, not of timm; set it to false")
        width = self.predictor_embed_dim or model.embed_dim
        if self.predictor_num_heads is not None and width % (4 * self.predictor_num_heads):
            found.append(
                f"objective.predictor_num_heads: {self.predictor_num_heads} heads of {width} channels are no multiples "
                "of 4 channels"
            )
        return found
