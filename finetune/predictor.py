"""A fine-tuned task ready to predict: images as a program holds them, or examples of files, to predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from finetune.data.batches import move
from finetune.data.examples import Example
from finetune.predictions import Classes, Prediction
from finetune.tasks.base import Task
from finetune.tasks.pixels import PixelTask
from finetune.tiling.tiled import tiled_map, tiled_objects
from finetune.tiling.tiles import Tiling
from pretrain.core.configlib import Precision
from pretrain.core.precision import autocast
from pretrain.data.views.orientation import recorded_orientation
from pretrain.data.views.pixels import ImageInput, to_images, to_pixels
from pretrain.data.views.values import recorded_range


class Predictor:
    """A task in eval mode on a device, with the record of its release (source, numbers, recipe).

    Images are read as those it was trained on: channels, range of values, photos turned upright or as stored. The
    network computes in the precision in which it was evaluated, so that its numbers are those of these predictions.
    """

    def __init__(self, task: Task, record: Mapping[str, Any], *, device: torch.device | str = "cpu"):
        self.task = task.to(device).eval()
        self.record, self.device = dict(record), torch.device(device)
        self.precision: Precision = record.get("precision", "fp32")
        self._reading = task.bare_backbone.in_chans, recorded_orientation(self.record), recorded_range(self.record)
        self._transform = task.eval_transform()

    def __repr__(self) -> str:
        return f"Predictor({self.name}: {len(self.classes)} classes, {self.device})"

    @property
    def name(self) -> str:
        """Of the task: classification, multi_label, detection, segmentation, depth."""
        return self.task.config.name

    @property
    def classes(self) -> Classes:
        """The names of the classes, in the order of the labels."""
        return self.task.classes

    def predict(
        self, images: ImageInput | Sequence[ImageInput], *, batch_size: int = 8, tiling: Tiling | None = None
    ) -> list[Prediction]:
        """A prediction per image, in the coordinates of that image: `Classified`, `Labelled`, `Detected`, `ClassMap` or
        `DepthMap`.

        Args:
            images: see `pretrain.data.views.pixels.to_images`.
            tiling: of large images, see `predict_tiled`.

        Raises:
            ValueError: an image cannot be read, or has other channels, or the task has no predictions of tiles.
        """
        pixels = to_images(images, *self._reading)
        examples = [Example(number, "", image, None) for number, image in enumerate(pixels)]
        if tiling is not None:
            return [self.predict_tiled(example, tiling, batch_size=batch_size) for example in examples]
        groups = [examples[start : start + batch_size] for start in range(0, len(examples), batch_size)]
        return [prediction for group in groups for prediction in self.predict_examples(group)]

    def predict_tiled(self, example: Example, tiling: Tiling, *, batch_size: int = 8) -> Prediction:
        """The prediction of a large image from its tiles, `batch_size` of them at once.

        Each object is found once; outputs of maps are averaged where tiles overlap.

        Raises:
            ValueError: a classifier, which has one answer for an image and none for a tile.
        """
        if self.name == "detection":
            return tiled_objects(example, tiling, self.predict_examples, batch_size)
        if isinstance(self.task, PixelTask):
            return tiled_map(example, tiling, self.task, self._scores, batch_size)
        raise ValueError(f"tiles are for detection, segmentation and depth; {self.name} has one answer for an image")

    def _scores(self, examples: Sequence[Example]) -> list[torch.Tensor]:
        assert isinstance(self.task, PixelTask)
        batch = self.task.collate([self._transform(example) for example in examples])
        with autocast(self.device, self.precision):
            return self.task.scores(move(batch, self.device))

    @torch.no_grad()
    def predict_examples(self, examples: Sequence[Example]) -> Sequence[Prediction]:
        """A prediction per example, computed as one batch."""
        batch = self.task.collate([self._transform(example) for example in examples])
        with autocast(self.device, self.precision):
            return self.task.predict(move(batch, self.device))

    def draw(self, image: ImageInput, prediction: Prediction) -> np.ndarray:
        """uint8 [h, w, 3]: the image next to its prediction."""
        example = Example(0, "", to_pixels(image, *self._reading), None)
        return self.task.picture(example.as_picture(self.record.get("picture_channels")), prediction)
