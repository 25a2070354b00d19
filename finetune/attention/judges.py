"""What says of each image whether a network was right: neighbours among the images, or the head of a classifier."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from finetune.tasks.classification import Classification
from pretrain.models.backbones.contract import ImageEncoder
from pretrain.probes.features import backbone_features, with_both
from pretrain.probes.knn import knn_correct

K = 20


class Neighbours:
    """The label of an image by the k nearest others of the set (weighted vote as `fovea probe`), on the class token and
    the mean patch token together.

    Args:
        images: normalized [n, C, H, W]. labels: [n]; None: the network only runs.
    """

    def __init__(self, backbone: ImageEncoder, images: Tensor, labels: Tensor | None, *, batch_size: int, k: int = K):
        self.backbone, self.images, self.labels, self.batch_size, self.k = backbone, images, labels, batch_size, k

    @torch.no_grad()
    def __call__(self) -> np.ndarray | None:
        parts = []
        for batch in self.images.split(self.batch_size):
            found = with_both(backbone_features(self.backbone, batch))
            parts.append(list(found.values())[-1])
        if self.labels is None:
            return None
        features = torch.cat(parts)
        right = knn_correct(features, self.labels, features, self.labels, ks=(self.k,), leave_one_out=True)
        return right[self.k].cpu().numpy()

    def in_words(self) -> str:
        return f"{self.k}-NN among the images themselves, each without itself, top-1"


class Head:
    """The label of an image by a fine-tuned classifier, top-1.

    Args:
        images: normalized [n, C, H, W]. labels: [n], numbers of the task's classes; None: the network only runs.
    """

    def __init__(self, task: Classification, images: Tensor, labels: Tensor | None, *, batch_size: int):
        self.task, self.images, self.labels, self.batch_size = task, images, labels, batch_size

    @torch.no_grad()
    def __call__(self) -> np.ndarray | None:
        parts = [self.task.logits(batch).argmax(-1) for batch in self.images.split(self.batch_size)]
        return None if self.labels is None else (torch.cat(parts) == self.labels).cpu().numpy()

    def in_words(self) -> str:
        return "the classifier of the release, top-1"
