"""Semantic segmentation: a class for every pixel, by a linear layer, UPerNet, DPT or EoMT on any backbone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.data.examples import Example, Examples
from finetune.data.maps.label_maps import VOID
from finetune.metrics.confusion import SegmentationMetric
from finetune.predictions import Classes, ClassMap
from finetune.report.maps import segmentation_picture
from finetune.tasks import sliding
from finetune.tasks.configs.segmentation import SegmentationConfig
from finetune.tasks.opened import OpenedBackbone
from finetune.tasks.pixel_heads import build_head
from finetune.tasks.pixels import PixelTask, PixelTrain, original_sizes
from pretrain.models.export.outputs import ExportOutput


class Segmentation(PixelTask):
    """See `SegmentationConfig`.

    Raises:
        ValueError: fewer than two classes, or the head does not fit the backbone.
    """

    def __init__(self, config: SegmentationConfig, opened: OpenedBackbone, classes: Classes):
        if len(classes) < 2:
            raise ValueError(
                f"segmentation of {len(classes)} class ({', '.join(classes)}): at least two are "
                "needed; for COCO instances name the other pixels by task.background"
            )
        super().__init__(config, opened, classes)
        self.head = build_head(config.head, self.dense, len(classes))

    @property
    def noises(self) -> dict[str, tuple[int, ...]]:
        return super().noises | self.head.noises

    def train_transform(self) -> PixelTrain:
        return self.crops(void=VOID, cat_max_ratio=self.config.cat_max_ratio)

    def losses(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        images, target = self.normalize(batch["image"]), batch["target"].long()
        return self.head.losses(self.dense, images, target, batch, step / self.total_steps)

    def export_outputs(self) -> tuple[ExportOutput, ...]:
        return (ExportOutput("scores", "[batch, K, height, width]", per_pixel=True),)

    def outputs(self, images: Tensor, /) -> tuple[Tensor, ...]:
        return (self.head.scores(self.dense, images),)

    def prepare_export(self) -> None:
        self.head.prepare_export()

    def fixed_size_reason(self) -> str | None:
        return self.head.fixed_size_reason or super().fixed_size_reason()

    def predict(self, batch: dict[str, Any]) -> list[ClassMap]:
        found = []
        for image, size in zip(batch["image"], original_sizes(batch), strict=True):
            found.append(ClassMap(sliding.most_likely(self.map_of(image), size).to(torch.uint8).cpu().numpy()))
        return found

    def map_of(self, image: Tensor) -> Tensor:
        return self.over_image(image, probabilities=self.head.gives_logits)

    def values(self, scores: Tensor) -> np.ndarray:
        return scores.argmax(dim=0).to(torch.uint8).cpu().numpy()

    def as_prediction(self, values: np.ndarray) -> ClassMap:
        return ClassMap(values)

    def metric(self, examples: Examples) -> SegmentationMetric:
        return SegmentationMetric(self.classes, protocol=self.inference_protocol())

    def picture(self, example: Example, prediction: ClassMap | None) -> np.ndarray:
        values = None if prediction is None else prediction.classes
        return segmentation_picture(example.image, example.target, values, self.classes, caption=example.name)
