"""Multi-label classification: a binary cross entropy for each label; all else is that of classification.

Sources: binary cross entropy as in Wightman et al. 2021 ("ResNet strikes back"), averaged over images and labels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from finetune.data.examples import Example, Examples
from finetune.metrics.label_precision import LabelPrecision
from finetune.metrics.metric import Metric
from finetune.predictions import Labelled, Prediction
from finetune.report.labels import multi_label_picture
from finetune.tasks.classification import Classification
from finetune.tasks.configs.multi_label import MultiLabelConfig


class MultiLabel(Classification):
    """Images to any number of labels each.

    Batch: as of `Classification`, "label" float32 [b, K] of 0 and 1.
    """

    config: MultiLabelConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        self._statistics.remember()
        smoothing = self.mixer.smoothing
        targets = batch["label"].float() * (1 - smoothing) + smoothing / 2
        images, targets = self.mixer.mix(self.normalize(batch["image"]), targets, self.mix_uniforms(batch))
        logits = self.logits(images, batch.get("drop")).float()
        found, true = logits.detach() > 0, targets > 0.5
        both = 2 * (found & true).sum()
        f1 = both / (found.sum() + true.sum()).clamp(min=1)
        return {"loss": F.binary_cross_entropy_with_logits(logits, targets), "f1_train": f1}

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def predict(self, batch: dict[str, Any]) -> list[Prediction]:
        (logits,) = self.outputs(self.normalize(batch["image"]))
        found = self.probabilities(logits.float()).cpu().numpy()
        return [Labelled(row, self.config.threshold) for row in found]

    def answer_facts(self) -> dict[str, Any]:
        return {"scores": "sigmoid", "threshold": self.config.threshold}

    def metric(self, examples: Examples) -> Metric:
        return LabelPrecision(self.classes, self.config.threshold, protocol=self.eval_transform().in_words())

    def picture(self, example: Example, prediction: Labelled | None) -> np.ndarray:  # pyright: ignore
        found = None if prediction is None else prediction.probabilities
        return multi_label_picture(example.image, example.target, found, self.classes, threshold=self.config.threshold)
