"""Average precision of each label over all images, its mean (mAP), and F1 at a threshold.

The rows of all ranks are gathered, each image once, so that any number of ranks gives exactly the result of one.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from finetune.data.examples import Example
from finetune.metrics.metric import Scores, gather_rows
from finetune.predictions import Classes, Labelled

_Row = tuple[np.ndarray, np.ndarray]  # bool [K], float32 [K]


def average_precision(truth: np.ndarray, scores: np.ndarray) -> float:
    """The sum over distinct scores of precision times the gain of recall; nan if nothing is true.

    Args:
        truth: bool [n]. scores: [n].
    """
    if not truth.any():
        return math.nan
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # equal scores are one threshold
    right = np.cumsum(truth[order])[ends]
    return float((np.diff(right, prepend=0) * right / (ends + 1)).sum() / right[-1])


class LabelPrecision:
    """Average precision and F1 of labels; images without known labels are not counted.

    Args:
        threshold: of F1. protocol: one sentence on data and images; the metric is appended.
    """

    def __init__(self, classes: Classes, threshold: float, *, protocol: str) -> None:
        self.classes, self.threshold = classes, threshold
        self.protocol = f"{protocol}; mean of the average precision of {len(classes)} labels; F1 at {threshold:g}"
        self._rows: dict[int, _Row] = {}

    def update(self, index: int, example: Example, prediction: Labelled) -> float:
        """The average precision of this image's labels; nan if it has none."""
        if example.target is None:
            return math.nan
        truth = np.asarray(example.target) > 0.5
        self._rows[index] = truth, prediction.probabilities
        return average_precision(truth, prediction.probabilities)

    def gather(self) -> None:
        self._rows = gather_rows(self._rows)

    def compute(self) -> Scores:
        """Values "map", "macro_f1", "micro_f1" and "exact", the share of images with exactly their labels.

        Raises:
            ValueError: no image has a label.
        """
        truth = np.array([row[0] for row in self._rows.values()], dtype=bool).reshape(-1, len(self.classes))
        scores = np.array([row[1] for row in self._rows.values()], dtype=np.float32).reshape(-1, len(self.classes))
        if not truth.any():
            raise ValueError("average precision: no image of the validation set has a label")
        found = scores >= self.threshold
        right, true, said = (found & truth).sum(0), truth.sum(0), found.sum(0)
        per_class: list[dict[str, Any]] = []
        for i, name in enumerate(self.classes):
            ap = average_precision(truth[:, i], scores[:, i])
            per_class.append(
                {
                    "name": name,
                    "images": int(true[i]),
                    "predicted": int(said[i]),
                    "ap": None if math.isnan(ap) else ap,
                    "f1": _share(2 * right[i], true[i] + said[i]),
                    "precision": _share(right[i], said[i]),
                    "recall": _share(right[i], true[i]),
                }
            )
        met = [row for row in per_class if row["images"]]
        values = {
            "map": float(np.mean([row["ap"] for row in met])),
            "macro_f1": float(np.mean([row["f1"] for row in met])),
            "micro_f1": _share(2 * right.sum(), true.sum() + said.sum()) or 0.0,
            "exact": float((found == truth).all(1).mean()),
        }
        without = (
            f"; {len(per_class) - len(met)} labels without an image do not count" if len(met) < len(per_class) else ""
        )
        return Scores(values, f"{self.protocol}; {len(truth)} images{without}", per_class)


def _share(part: Any, whole: Any) -> float | None:
    return int(part) / int(whole) if whole else None
