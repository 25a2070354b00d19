"""Crops of two sizes without a teacher: the two halves of self-distillation's settings and base class."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from pretrain.core.trainable import Batch
from pretrain.data.views.specs import Noise, ViewSpec
from pretrain.objectives.configs.multi_crop import MultiCropConfig
from pretrain.objectives.configs.self_distillation import DistillationTeacherConfig, SelfDistillationConfig
from pretrain.objectives.multi_crop import MultiCrop
from tests.objectives.tiny import Shape, batch


class CropsConfig(MultiCropConfig):
    name: Literal["crops"] = "crops"
    local_crops_number: int = 3
    local_crops_size: int = 16


class Crops(MultiCrop[CropsConfig]):
    def __init__(self, config: CropsConfig):
        super().__init__()
        self.config = config
        self.encoder = nn.Identity()

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        return {f"loss{i}": crops.mean() for i, crops in enumerate(self.crops(batch))}


def test_a_method_with_crops_and_no_teacher_has_no_settings_of_a_teacher():
    assert not CropsConfig.has_teacher
    assert set(CropsConfig.model_fields).isdisjoint(DistillationTeacherConfig.model_fields)
    both = set(MultiCropConfig.model_fields) | set(DistillationTeacherConfig.model_fields)
    assert both == set(SelfDistillationConfig.model_fields)


def test_without_a_teacher_the_drop_path_is_the_models():
    for rate, drawn in ((0.0, []), (0.1, [(5, 2, 2)])):
        specs = CropsConfig().views(Shape(drop_path_rate=rate))
        assert [spec.shape for spec in specs if isinstance(spec, Noise)] == drawn
    assert [(view.name, view.count) for view in specs if isinstance(view, ViewSpec)] == [
        *(("global", 1), ("global", 1), ("local", 3)),
    ]
    assert CropsConfig().problems(Shape(drop_path_rate=0.1)) == []


def test_crops_come_by_resolution_and_are_shown():
    of, shape = Crops(CropsConfig()), Shape()
    given = batch(of, shape)
    assert [list(crops.shape) for crops in of.crops(given)] == [[8, 3, 24, 32], [12, 3, 16, 16]]
    assert of(given, 0).keys() == {"loss0", "loss1"}
    shown = of.pictures(given, 0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert shown.keys() == {"global crops", "local crops"}
