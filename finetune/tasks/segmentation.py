"""Semantic segmentation: a class for every pixel, by a linear layer, UPerNet or DPT on the maps of any backbone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.backbones.opened import Opened
from finetune.data.dense_transforms import DenseTrain
from finetune.data.examples import Example, Examples
from finetune.data.label_maps import VOID
from finetune.heads.dense_parts import resize
from finetune.heads.dpt import DPT
from finetune.heads.linear_seg import LinearHead
from finetune.heads.upernet import AuxiliaryFCN, UPerNet
from finetune.metrics.confusion import SegmentationMetric
from finetune.predictions import Classes, ClassMap
from finetune.report.maps import segmentation_picture
from finetune.tasks import sliding
from finetune.tasks.configs.segmentation import SegmentationConfig
from finetune.tasks.pixels import PixelTask, PixelTrain, original_sizes


class Segmentation(PixelTask):
    """See `SegmentationConfig`.

    The loss is the cross entropy of every pixel of the crops; void pixels count 0, and the mean is over all, so that a
    step does not depend on how its crops are divided over ranks.
    """

    head_prefixes = ("head.", "auxiliary.")

    def __init__(self, config: SegmentationConfig, opened: Opened, classes: Classes):
        linear = config.head == "linear"
        super().__init__(config, opened, classes, num_maps=1 if linear else 4, norm=linear)
        channels, strides = self.dense.channels, self.dense.strides
        self.auxiliary: AuxiliaryFCN | None = None
        self.head: nn.Module
        if linear:
            self.head = LinearHead(channels, len(classes), dropout=config.dropout)
        elif config.head == "dpt":
            self.head = DPT(channels, strides, len(classes), width=config.width)
        else:
            self.head = UPerNet(channels, strides, len(classes), width=config.width, dropout=config.dropout)
            if config.auxiliary:
                width = config.auxiliary_width
                self.auxiliary = AuxiliaryFCN(channels[2], len(classes), width=width, dropout=config.dropout)

    @property
    def noises(self) -> dict[str, tuple[int, ...]]:
        found = super().noises
        for name, head in (("head_dropout", self.head), ("auxiliary_dropout", self.auxiliary)):
            count: int = getattr(head, "noise", 0)
            if count:
                found[name] = (count,)
        return found

    def train_transform(self) -> PixelTrain:
        config = self.config
        return PixelTrain(
            DenseTrain(
                crop=config.window,
                resize=config.resize,
                scale=config.scale,
                hflip=config.hflip,
                photometric=config.photometric,
                cat_max_ratio=config.cat_max_ratio,
                void=VOID,
                fill=self.fill(),
            )
        )

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        target = batch["target"].long()
        maps = self.maps(self.normalize(batch["image"]), batch.get("drop"))
        logits = resize(self._logits(maps, batch.get("head_dropout")), target.shape[1:])
        loss = pixel_loss(logits, target)
        with torch.no_grad():
            known = target != VOID
            right = ((logits.argmax(1) == target) & known).sum() / known.sum().clamp(min=1)
        found = {"pixel_accuracy": right.detach()}
        if self.auxiliary is not None:
            other = resize(self.auxiliary(maps[2], batch.get("auxiliary_dropout")), target.shape[1:])
            auxiliary = pixel_loss(other, target)
            found |= {"head_loss": loss.detach(), "auxiliary_loss": auxiliary.detach()}
            loss = loss + self.config.auxiliary * auxiliary
        return {"loss": loss, **found}

    def scores(self, images: Tensor) -> Tensor:
        """Normalized images [b, 3, H, W] -> logits [b, K, h, w]."""
        return self._logits(self.maps(images), None)

    def predict(self, batch: dict[str, Any]) -> list[ClassMap]:
        found = []
        for image, size in zip(batch["image"], original_sizes(batch), strict=True):
            scores = self.over_image(self.scores, image, probabilities=True)
            found.append(ClassMap(sliding.most_likely(scores, size).to(torch.uint8).cpu().numpy()))
        return found

    def metric(self, examples: Examples) -> SegmentationMetric:
        return SegmentationMetric(self.classes, protocol=self.inference_protocol())

    def picture(self, example: Example, prediction: ClassMap | None) -> np.ndarray:
        values = None if prediction is None else prediction.classes
        return segmentation_picture(example.image, example.target, values, self.classes, caption=example.name)

    def _logits(self, maps: list[Tensor], uniforms: Tensor | None) -> Tensor:
        return self.head(maps) if isinstance(self.head, DPT) else self.head(maps, uniforms)


def pixel_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of logits [b, K, h, w] for target int64 [b, h, w]: void pixels are 0, the mean is over all.

    In rows: torch's loss of maps has no deterministic form on a GPU.
    """
    rows = logits.float().permute(0, 2, 3, 1).flatten(0, 2)
    return F.cross_entropy(rows, target.flatten(), ignore_index=VOID, reduction="sum") / target.numel()
