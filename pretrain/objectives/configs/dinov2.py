"""Configuration of DINOv2 and of its form in DINOv3. No torch here.

Oquab et al. 2023, "DINOv2: Learning Robust Visual Features without Supervision"; Siméoni et al. 2025, "DINOv3".
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field

from pretrain.core.configlib import Positive
from pretrain.core.schedule import PhasesConfig
from pretrain.data.views.masks import StratifiedBlockMask
from pretrain.data.views.specs import InputSpec, Noise, ViewSpec
from pretrain.objectives.configs.checks import mask_problems
from pretrain.objectives.configs.gram import GramConfig
from pretrain.objectives.configs.self_distillation import SelfDistillationConfig
from pretrain.objectives.configs.shape import ModelShape, patch_grid
from pretrain.objectives.configs.values import Probability, Scale, both_sides


class DINOv2Config(SelfDistillationConfig):
    """DINO and iBOT together, with KoLeo regularization (Oquab et al. 2023); with other settings DINOv3.

    The defaults are those of the official code of DINOv2 (ssl_default_config).
    """

    name: Literal["dinov2"] = "dinov2"
    out_dim: Positive = Field(65536, description="number of prototypes of the class token")
    head_hidden_dim: Positive = 2048
    head_bottleneck_dim: Positive = 256
    head_nlayers: Positive = 3
    separate_patch_head: bool = Field(False, description="a separate head for patches, with sizes patch_*")
    patch_out_dim: Positive = 65536
    patch_hidden_dim: Positive = 2048
    patch_bottleneck_dim: Positive = 256
    patch_nlayers: Positive = 3
    norm_last_layer: bool = Field(False, description="fix prototypes at length 1")
    prototypes: Literal["normalized", "linear"] = Field(
        "normalized", description="normalized: direction and length are weights of their own; linear: as in DINOv3"
    )
    token_std: float = Field(
        1e-6, gt=0, description="deviation of the initial class token and registers; 0.02 in DINOv3"
    )
    centering: Literal["centering", "sinkhorn_knopp"] = Field(
        "centering", description="of the teacher's logits: by an average over past batches, or within the batch"
    )
    sinkhorn_iterations: Positive = 3
    dino_weight: float = Field(1.0, ge=0, description="weight of the class token's loss")
    local_weight_schedule: PhasesConfig | None = Field(
        None, description="factor on the loss of local crops; default: 1"
    )
    local_norm: bool = Field(
        False, description="in training the class token of local crops has a last norm of its own (DINOv3's 7B)"
    )
    ibot_weight: float = Field(1.0, ge=0, description="weight of the masked patches' loss")
    koleo_weight: float = Field(0.1, ge=0, description="weight of KoLeo, which spreads features apart")
    koleo_scope: Literal["rank", "all"] = Field(
        "rank", description="nearest neighbours are found in the micro-batch of the rank, or in those of all ranks"
    )
    koleo_neighbours: Positive = Field(1, description="nearest neighbours that count")
    koleo_group: Positive | None = Field(
        None, description="images of successive ranks that koleo_scope: all searches, as 16 in DINOv3; default: all"
    )
    gram: GramConfig | None = Field(None, description="Gram anchoring (DINOv3)")
    teacher_temp: float = Field(0.07, gt=0)
    warmup_teacher_temp: float = Field(0.04, gt=0)
    warmup_teacher_temp_epochs: int = Field(30, ge=0, description="linear warm-up, updated at every step")
    teacher_temp_schedule: PhasesConfig | None = Field(None, description="instead of the three settings before")
    momentum_schedule: PhasesConfig | None = Field(
        None, description="instead of momentum_teacher and final_momentum_teacher"
    )
    epoch_steps: Positive | None = Field(
        None, description="steps per epoch in the *_epochs settings; officially 1250; default: one pass over the data"
    )
    mask_ratio: tuple[Probability, Probability] = Field(
        (0.1, 0.5), description="fraction of masked patches in masked crops"
    )
    mask_prob: Probability = Field(0.5, description="fraction of the global crops that are masked")
    mask_min_patches: Positive = Field(4, description="minimum of a masked block")
    mask_exact: bool = Field(
        False, description="a masked crop hides exactly the upper end of its part of mask_ratio, as in DINOv3"
    )
    mask_roll: bool = Field(False, description="masks are shifted around the edges at random")
    layerwise_decay: float = Field(0.9, gt=0, le=1, description="of the learning rate, per block from last to first")
    patch_embed_lr_mult: float = Field(0.2, gt=0)
    momentum_teacher: float = Field(0.992, ge=0, le=1, description="EMA momentum of the first step")
    drop_path_rate: float = Field(0.3, ge=0, lt=1, description="of the student; the teacher has none")
    drop_path_uniform: bool = Field(True, description="the same rate in all blocks; false: rising linearly")
    drop_path_subset: bool = Field(
        True, description="compute a branch for a fixed fraction of the micro-batch only; false: drop per sample"
    )
    rope_shift: float | None = Field(
        None, gt=0, description="coordinates of model.pos_embed=rope are shifted by up to this much in training"
    )
    rope_jitter: float | None = Field(
        None, gt=1, description="they are stretched by 1/x to x, rows and columns each by a number of their own"
    )
    rope_rescale: float | None = Field(
        None, gt=1, description="and both by one number from 1/x to x; 2 in DINOv3. New numbers for every block"
    )
    global_crops_scale: Scale = (0.32, 1.0)
    local_crops_scale: Scale = (0.05, 0.32)

    needs: ClassVar[frozenset[str]] = frozenset({"image", "patches", "mask"})
    clips_modules: ClassVar[bool] = True
    batch_coupled: ClassVar[tuple[str, ...]] = (
        "KoLeo finds nearest neighbours in the micro-batch of a rank or (koleo_scope: all) of all ranks",
        "Gram anchoring with level: batch compares the patches of one micro-batch of a rank",
        "Sinkhorn-Knopp balances the prototypes over one micro-batch of all ranks",
        "momentum_schedule is a momentum per step",
    )

    def mask(self, model: ModelShape) -> StratifiedBlockMask:
        """Mask of the two global crops.

        Raises:
            ValueError: the grid cannot hold it.
        """
        return StratifiedBlockMask(
            "mask",
            patch_grid(model),
            count=2,
            ratio=self.mask_ratio,
            prob=self.mask_prob,
            min_patches=self.mask_min_patches,
            exact=self.mask_exact,
            roll=self.mask_roll,
        )

    def views(self, model: ModelShape) -> list[InputSpec]:
        """The crops of self-distillation, the masks of the global ones, the Gram teacher's view of those, and the
        numbers that move the coordinates of global and local crops in each block (`rope.moved_axes`)."""
        found = [*super().views(model), self.mask(model)]
        if self.moves_coordinates:
            found.append(Noise("rope", (2, model.num_blocks, 5), of_step=True))
        if self.gram is not None and self.gram.img_size is not None:
            found.append(ViewSpec("gram", both_sides(self.gram.img_size), same_as="global", colours=False))
        return found

    @property
    def moves_coordinates(self) -> bool:
        """Whether rotary positions are moved or stretched in training."""
        return any(setting is not None for setting in (self.rope_shift, self.rope_jitter, self.rope_rescale))

    def problems(self, model: ModelShape) -> list[str]:
        found = super().problems(model) + mask_problems("mask_ratio", lambda: self.mask(model))
        if self.drop_path_rate and self.drop_path_subset and "own_blocks" not in model.provides:
            found.append("objective.drop_path_subset: true needs a ViT of Fovea, not of timm; set it to false")
        if (self.layerwise_decay, self.patch_embed_lr_mult) != (1, 1) and "layers" not in model.provides:
            found.append(
                f"objective.layerwise_decay: {self.layerwise_decay} and patch_embed_lr_mult {self.patch_embed_lr_mult} "
                "need a backbone with numbered blocks; set both to 1"
            )
        if self.moves_coordinates and not model.rotates:
            key = next(key for key in ("rope_shift", "rope_jitter", "rope_rescale") if getattr(self, key) is not None)
            found.append(
                f"objective.{key}: {getattr(self, key)} needs model.pos_embed=rope without frequencies; set it to null"
            )
        if self.local_norm and ("own_blocks" not in model.provides or not self.local_crops_number):
            what = "local crops" if "own_blocks" in model.provides else "a ViT of Fovea, not of timm"
            found.append(f"objective.local_norm: true needs {what}; set it to false")
        if self.prototypes == "linear" and self.norm_last_layer:
            found.append("objective.norm_last_layer: true, but prototypes are linear; set it to false")
        limits = {"teacher_temp_schedule": (1e-6, math.inf), "momentum_schedule": (0.0, 1.0)}
        for key, (low, high) in limits.items():
            phases: PhasesConfig | None = getattr(self, key)
            if phases is not None and not all(low <= x <= high for x in (phases.start, phases.peak, phases.end)):
                found.append(f"objective.{key}: its values must be from {low:g} to {high:g}")
        return found + (self.gram.problems(model.patch_size) if self.gram is not None else [])

    def batch_problems(self, micro_batch: int, world_size: int) -> list[str]:
        if not self.koleo_weight:
            return []
        together, group = micro_batch * (world_size if self.koleo_scope == "all" else 1), self.koleo_group
        if group is not None and self.koleo_scope == "all" and (group % micro_batch or together % group):
            return [
                f"objective.koleo_group: {group} images are not those of complete ranks; give a multiple of the "
                f"micro-batch {micro_batch} that divides {together}, the images of {world_size} ranks"
            ]
        together = min(together, group or together)
        if together > self.koleo_neighbours:
            return []
        other = "" if self.koleo_scope == "all" or world_size == 1 else ", koleo_scope=all"
        which = "each image's neighbour" if self.koleo_neighbours == 1 else f"{self.koleo_neighbours} neighbours"
        return [
            f"objective.koleo_weight: KoLeo finds {which} in the same micro-batch, but its size is {together}; raise "
            f"optim.global_batch_size, lower engine.accumulation_steps{other}, or set koleo_weight=0"
        ]
