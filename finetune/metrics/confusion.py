"""Metrics of semantic segmentation from one confusion matrix of all pixels of all images.

mIoU as PASCAL VOC defined it (Everingham et al. 2010, section 4.2.1); ADE20K and Cityscapes use it too: pixels are
summed over all images before any ratio is taken. The counts are int64, so their sum over ranks is exact in any order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from finetune.data.examples import Example
from finetune.metrics.metric import Scores, gather_counts, gather_rows
from finetune.predictions import Classes, ClassMap

VOID = 255


class SegmentationMetric:
    """Counts pixels by true and predicted class; pixels whose truth is void do not count.

    Args:
        classes: by label.
        protocol: how the predictions were computed; the metric is appended.
    """

    def __init__(self, classes: Classes, *, protocol: str):
        self.classes = classes
        self.protocol = (
            f"{protocol}; mIoU at the original sizes over {len(classes)} classes, one confusion matrix of all images, "
            f"void ({VOID}) left out, classes in neither truth nor prediction left out of the mean"
        )
        self.counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
        self._seen: dict[int, None] = {}

    def update(self, index: int, example: Example, prediction: ClassMap) -> float:
        """Count one image; repeated images count once.

        Returns:
            the mean IoU of the classes in this image's truth, 1 if it has none.

        Raises:
            ValueError: prediction and truth differ in size.
        """
        counts = confusion(example.target, prediction.classes, len(self.classes), name=example.name)
        if index not in self._seen:
            self._seen[index] = None
            self.counts += counts
        present = counts.sum(axis=1) > 0
        return float(ious(counts)[present].mean()) if present.any() else 1.0

    def gather(self) -> None:
        self.counts = gather_counts(self.counts)
        self._seen = gather_rows(self._seen)

    def compute(self) -> Scores:
        """The numbers of all images.

        Raises:
            ValueError: no pixel of any image has a class.
        """
        total = int(self.counts.sum())
        if not total:
            raise ValueError(f"no pixel of the {len(self._seen)} images has a class: all are void ({VOID})")
        truth, predicted, hits = self.counts.sum(axis=1), self.counts.sum(axis=0), self.counts.diagonal()
        iou = ious(self.counts)
        with np.errstate(invalid="ignore", divide="ignore"):
            recall, dice = hits / truth, 2 * hits / (truth + predicted)
        values = {
            "mIoU": float(np.nanmean(iou)),
            "pixel_accuracy": int(hits.sum()) / total,
            "mean_accuracy": float(np.nanmean(recall)),
            "mean_dice": float(np.nanmean(dice)),
        }
        rows: list[dict[str, Any]] = [
            {
                "name": name,
                "pixels": int(truth[i]),
                "predicted_pixels": int(predicted[i]),
                "iou": _known(iou[i]),
                "accuracy": _known(recall[i]),
                "dice": _known(dice[i]),
            }
            for i, name in enumerate(self.classes)
        ]
        return Scores(values, f"{len(self._seen)} images, {self.protocol}", rows, self.counts)


def confusion(truth: np.ndarray, predicted: np.ndarray, num_classes: int, *, name: str = "an image") -> np.ndarray:
    """int64 [K, K], rows are the truth, of two maps [H, W]; pixels whose truth is void are left out.

    Raises:
        ValueError: the maps differ in size, or contain an id that is no class.
    """
    if truth.shape != predicted.shape:
        raise ValueError(f"{name}: predicted a map of {predicted.shape}, the truth is {truth.shape}")
    known = truth != VOID
    rows, columns = truth[known].astype(np.int64), predicted[known].astype(np.int64)
    for what, ids in (("truth", rows), ("prediction", columns)):
        if len(ids) and not 0 <= ids.min() <= ids.max() < num_classes:
            raise ValueError(f"{name}: the {what} holds ids {ids.min()} to {ids.max()}, of {num_classes} classes")
    counts = np.bincount(rows * num_classes + columns, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def ious(counts: np.ndarray) -> np.ndarray:
    """Intersection over union of each class, float64 [K]; nan for a class in neither truth nor prediction."""
    hits = counts.diagonal()
    with np.errstate(invalid="ignore"):
        return hits / (counts.sum(axis=1) + counts.sum(axis=0) - hits)


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
