"""The smallest real task: bright or dark, by a linear layer on the class token of a small ViT."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.data.examples import Example, Examples
from finetune.metrics.metric import Scores, gather_rows
from finetune.predictions import Classes, Classified, Prediction
from finetune.tasks.base import Task
from finetune.tasks.opened import OpenedBackbone
from pretrain.models.backbones.vit import ViT


def opened(*, img_size: tuple[int, int] = (32, 32), drop_path_rate: float = 0.0) -> OpenedBackbone:
    """A ViT of 2 blocks, 48 wide."""
    torch.manual_seed(0)
    vit = ViT(img_size, 8, embed_dim=48, depth=2, num_heads=3, pos_embed="learned", drop_path_rate=drop_path_rate)
    return OpenedBackbone(vit, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "a small ViT")


def to_train(example: Example, rng: np.random.Generator) -> dict[str, Any]:
    image = example.image[:, :: -1 if rng.random() < 0.5 else 1]
    return {"image": pixels(image), "label": torch.tensor(example.target)}


def to_predict(example: Example) -> dict[str, Any]:
    return {"image": pixels(example.image)}


def pixels(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


class Brightness(Task):
    head_prefixes = ("head.",)

    def __init__(self, config: Any, opened: OpenedBackbone, classes: Classes):
        super().__init__(config, opened, classes)
        self.backbone = opened.backbone
        self.norm = nn.BatchNorm1d(opened.backbone.embed_dim)
        self.head = nn.Linear(opened.backbone.embed_dim, len(classes))

    def logits(self, batch: dict[str, Any]) -> Tensor:
        return self.head(self.norm(self.backbone.forward_cls(self.normalize(batch["image"]), batch.get("drop"))))

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.logits(batch), batch["label"])}

    def train_transform(self):
        return to_train

    def eval_transform(self):
        return to_predict

    def predict(self, batch: dict[str, Any]) -> list[Prediction]:
        return [Classified(row) for row in F.softmax(self.logits(batch).float(), dim=1).numpy()]

    def metric(self, examples: Examples) -> Accuracy:
        return Accuracy()

    def picture(self, example: Example, prediction: Any | None) -> np.ndarray:
        return example.image


class Accuracy:
    protocol = "share of planted images told dark from bright"

    def __init__(self) -> None:
        self.rows: dict[int, bool] = {}

    def update(self, index: int, example: Example, prediction: Classified) -> float:
        self.rows[index] = int(prediction.probabilities.argmax()) == example.target
        return float(prediction.probabilities[example.target])

    def gather(self) -> None:
        self.rows = gather_rows(self.rows)

    def compute(self) -> Scores:
        if not self.rows:
            raise ValueError("no rows")
        return Scores({"accuracy": sum(self.rows.values()) / len(self.rows)}, self.protocol)
