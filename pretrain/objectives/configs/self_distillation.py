"""Settings of teacher and crops that DINO, iBOT and DINOv2 share. No torch here."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pretrain.objectives.configs.multi_crop import MultiCropConfig
from pretrain.objectives.configs.section import ObjectiveSection
from pretrain.objectives.configs.shape import ModelShape


class DistillationTeacherConfig(ObjectiveSection):
    """Settings of a student and its EMA teacher (Caron et al. 2021)."""

    student_temp: float = Field(0.1, gt=0)
    center_momentum: float = Field(0.9, ge=0, lt=1)
    momentum_teacher: float = Field(0.996, ge=0, le=1, description="EMA momentum of the first step")
    final_momentum_teacher: float = Field(1.0, ge=0, le=1, description="momentum at the end of a cosine schedule")
    freeze_last_layer_epochs: int = Field(1, ge=0, description="epochs in which the prototypes are frozen")
    drop_path_rate: float = Field(0.1, ge=0, lt=1, description="of the student; the teacher has none")
    sync_bn: bool = Field(True, description="batch norms, if any, over all ranks; false: per rank")
    pos_resize: Literal["exact", "dino", "antialias", "dino_antialias"] = Field(
        "dino", description="dino: as in the training of released weights; antialias: as DINOv2's with registers"
    )

    has_teacher: ClassVar[bool] = True
    step_momenta: ClassVar[tuple[str, ...]] = ("momentum_teacher", "center_momentum")


class SelfDistillationConfig(MultiCropConfig, DistillationTeacherConfig):
    """From all crops, a student predicts its EMA teacher's output for the global ones (Caron et al. 2021)."""

    def crops_drop_path(self, model: ModelShape) -> float:
        del model
        return self.drop_path_rate

    def problems(self, model: ModelShape) -> list[str]:
        found = super().problems(model)
        if model.drop_path_rate:
            found.append(
                f"model.drop_path_rate: {model.drop_path_rate}, but the student uses objective.drop_path_rate; "
                "set that instead"
            )
        return found
