"""Detection and instance segmentation: Faster, Mask and Cascade R-CNN, or heads with queries, on any backbone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from finetune.data.coco.box_sizes import anchor_warnings, box_sizes
from finetune.data.examples import Example, Examples
from finetune.data.transforms.detection import DetectionEval, DetectionTrain
from finetune.dense.build import dense_backbone
from finetune.metrics.average_precision import AveragePrecision
from finetune.predictions import Classes, Detected
from finetune.report.objects import detection_picture
from finetune.tasks import detection_heads
from finetune.tasks.base import Task
from finetune.tasks.configs.detection import DetectionConfig
from finetune.tasks.configs.detection_heads import RCNNHead
from finetune.tasks.opened import OpenedBackbone
from pretrain.models.export.outputs import ExportOutput


class Detection(Task):
    """See `DetectionConfig`. The head is an adapter of `detection_heads`."""

    backbone_prefix = "dense.backbone."
    head_prefixes = ("head.",)

    def __init__(self, config: DetectionConfig, opened: OpenedBackbone, classes: Classes):
        super().__init__(config, opened, classes)
        # ViTDet's pyramid reads a plain backbone without its last norm; Swin and ConvNeXt have a norm for each stage.
        plain = "layers" in opened.backbone.provides
        norm = config.final_norm or not plain or not isinstance(config.head, RCNNHead)
        self.dense = dense_backbone(
            opened.backbone,
            window=config.window,
            global_blocks=config.global_blocks,
            rel_pos=config.rel_pos,
            norm=norm,
        )
        self.head: detection_heads.Head = detection_heads.build(config, self.dense, len(classes))

    @property
    def noises(self) -> dict[str, tuple[int, ...]]:
        return super().noises | ({"head": (self.head.noise,)} if self.head.noise else {})

    def data_warnings(self, train: Examples) -> list[str]:
        anchors = self.head.anchors
        return [] if anchors is None else anchor_warnings(box_sizes(train), self.config.test_canvas, *anchors)

    def train_transform(self) -> DetectionTrain:
        config = self.config
        return DetectionTrain(
            size=config.canvas,
            scale=config.scale,
            hflip=config.hflip,
            vflip=config.vflip,
            photometric=config.photometric,
            masks=config.with_masks,
            crowds=self.head.reads_crowds,
            fill=self.fill(),
        )

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        images = self.normalize(batch["image"])
        return self.head.losses(self.dense, images, batch, step / self.total_steps)

    def eval_transform(self) -> DetectionEval:
        return DetectionEval(self.config.test_canvas, self.fill())

    def predict(self, batch: dict[str, Any]) -> list[Detected]:
        contents, sizes = _pairs(batch["content"]), _pairs(batch["original_size"])
        return self.head.predict(self.dense, self.normalize(batch["image"]), contents, sizes)

    def metric(self, examples: Examples) -> AveragePrecision:
        height, width = self.config.test_canvas
        return AveragePrecision(
            self.classes,
            self.config.with_masks,
            f"{len(examples)} images, each fitted into {height} x {width} px",
            max_detections=self.config.max_detections,
        )

    def picture(self, example: Example, prediction: Detected | None) -> np.ndarray:
        return detection_picture(example.image, example.target, prediction, self.classes, caption=example.name)

    def export_outputs(self) -> tuple[ExportOutput, ...]:
        return self.head.export_outputs()

    def outputs(self, images: Tensor, /) -> tuple[Tensor, ...]:
        return self.head.outputs(self.dense, images)

    @property
    def detects(self) -> bool:
        return self.head.detects

    def detections(self, images: Tensor, content: Tensor) -> tuple[Tensor, ...]:
        return self.head.detections(self.dense, images, content)

    @property
    def smallest_side(self) -> int:
        return self.head.smallest_side

    def predict_from(self, compute: Callable[..., tuple[Tensor, ...]]) -> None:
        self.head.predict_from(compute)

    def at_size(self, size: tuple[int, int]) -> Detection:
        made = copy.deepcopy(self)
        made.config = self.config.model_copy(update={"test_size": size})
        return made

    def prepare_export(self) -> None:
        self.head.prepare_export()

    def fixed_size_reason(self) -> str | None:
        windows = None if self.config.window is None else "attention is in windows"
        return windows or super().fixed_size_reason()

    @property
    def input_size(self) -> tuple[int, int]:
        return self.config.test_canvas

    def preparation(self) -> str:
        height, width = self.config.test_canvas
        return f"fitted into {height} x {width} px at the top left, the rest filled with the mean pixel"

    def preparation_facts(self) -> dict[str, Any]:
        fill = [round(value) for value in self.fill()]
        return {"fit": list(self.input_size), "place": "top left", "fill": fill, "interpolation": "bilinear"}

    def answer_facts(self) -> dict[str, Any]:
        return self.head.answer_facts()

    @property
    def example_parts(self) -> tuple[str, ...] | None:
        return ("fitted", *self.head.example)

    def fill(self) -> tuple[float, ...]:
        """The pixel value, in 0 to 255, that normalizes to 0: it fills what is outside an image."""
        return tuple(value * 255 for value in self.mean.flatten().tolist())


def _pairs(sizes: Tensor) -> list[tuple[int, int]]:
    return [(int(height), int(width)) for height, width in sizes]
