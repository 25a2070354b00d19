"""Monocular depth: metres for every pixel, by a linear layer or DPT on the maps of any backbone."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from finetune.data.examples import Example, Examples
from finetune.heads.pixels.dense_parts import resize, without_padding
from finetune.heads.pixels.depth_bins import DepthBins, gradient_loss, silog
from finetune.metrics.depth_errors import DepthMetric
from finetune.predictions import Classes, DepthMap
from finetune.report.maps import depth_picture
from finetune.tasks.configs.depth import DepthConfig
from finetune.tasks.opened import OpenedBackbone
from finetune.tasks.pixel_heads import build_reader
from finetune.tasks.pixels import PixelTask, PixelTrain
from pretrain.models.export.outputs import ExportOutput


class Depth(PixelTask):
    """See `DepthConfig`. Pixels whose truth is 0 or outside the range are not trained on."""

    def __init__(self, config: DepthConfig, opened: OpenedBackbone, classes: Classes):
        super().__init__(config, opened, classes)
        self.head = build_reader(config.head, self.dense, config.bins)
        self.bins = DepthBins(
            config.bins, min_depth=config.min_depth, max_depth=config.max_depth, spacing=config.bin_spacing
        )

    @property
    def noises(self) -> dict[str, tuple[int, ...]]:
        return super().noises | ({"head_dropout": (self.head.noise,)} if self.head.noise else {})

    def train_transform(self) -> PixelTrain:
        return self.crops(void=0, scale_values=True)

    def losses(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        truth, config = batch["target"].float(), self.config
        maps = self.dense(self.normalize(batch["image"]), batch.get("drop"))
        predicted, size = self.bins(self.head(maps, batch.get("head_dropout"))), truth.shape[1:]
        predicted = resize(without_padding(predicted, size, self.dense.strides[0]), size)[:, 0]
        known = (truth >= config.min_depth) & (truth <= config.max_depth)
        loss = silog(predicted, truth, known, variance_focus=config.silog_lambda)
        found = {"silog": loss.detach()}
        if config.gradient_weight:
            gradients = gradient_loss(predicted, truth, known)
            found["gradients"] = gradients.detach()
            loss = loss + config.gradient_weight * gradients
        return {"loss": loss, **found}

    def export_outputs(self) -> tuple[ExportOutput, ...]:
        return (ExportOutput("metres", "[batch, 1, height, width]", per_pixel=True),)

    def outputs(self, images: Tensor, /) -> tuple[Tensor, ...]:
        metres = self.bins(self.head(self.dense(images)))
        return (without_padding(metres, images.shape[2:], self.dense.strides[0]),)

    def predict(self, batch: dict[str, Any]) -> list[DepthMap]:
        return [DepthMap(self.values(scores)) for scores in self.scores(batch)]

    def map_of(self, image: Tensor) -> Tensor:
        return self.over_image(image, probabilities=False)

    def values(self, scores: Tensor) -> np.ndarray:
        return scores[0].float().cpu().numpy()

    def as_prediction(self, values: np.ndarray) -> DepthMap:
        return DepthMap(values)

    def metric(self, examples: Examples) -> DepthMetric:
        config = self.config
        return DepthMetric(
            min_depth=config.min_depth,
            max_depth=config.max_depth,
            crop=config.eval_crop,
            protocol=self.inference_protocol(),
        )

    def picture(self, example: Example, prediction: DepthMap | None) -> np.ndarray:
        metres = None if prediction is None else prediction.depth
        return depth_picture(example.image, example.target, metres, caption=example.name)
