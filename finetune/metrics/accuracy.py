"""Top-1 and top-5 accuracy, by class too, and the confusion matrix: integer counts, exact for any number of ranks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from finetune.data.examples import Example
from finetune.metrics.metric import Scores, gather_counts
from finetune.predictions import Classes, Classified

CONFUSION_LIMIT = 2000  # classes; a larger table exceeds 32 MB and is unreadable


class Accuracy:
    """Share of images whose class is the most likely, or among the five most likely.

    An image with label -1 is not counted. Of equally likely classes the first is chosen.

    Args:
        protocol: one sentence on data and images; the metric is appended.
    """

    def __init__(self, classes: Classes, *, protocol: str):
        self.classes, self.protocol = classes, f"{protocol}; top-1 and top-5 of {len(classes)} classes"
        self.confusion = np.zeros((len(classes), len(classes)), np.int64)
        self.in_top5 = np.zeros(len(classes), np.int64)

    def update(self, index: int, example: Example, prediction: Classified) -> float:
        """The probability of the true class; nan without a label."""
        label = -1 if example.target is None else int(example.target)
        if label < 0:
            return math.nan
        order = np.argsort(-prediction.probabilities, kind="stable")
        self.confusion[label, order[0]] += 1
        self.in_top5[label] += label in order[:5]
        return float(prediction.probabilities[label])

    def gather(self) -> None:
        self.confusion = gather_counts(self.confusion)
        self.in_top5 = gather_counts(self.in_top5)

    def compute(self) -> Scores:
        """
        Raises:
            ValueError: no image has a label.
        """
        images = self.confusion.sum(1)
        count = int(images.sum())
        if not count:
            raise ValueError("accuracy: no image of the validation set has a label")
        right = np.diag(self.confusion)
        met = images > 0
        values = {
            "top1": int(right.sum()) / count,
            "top5": int(self.in_top5.sum()) / count,
            "mean_per_class": float(np.mean(right[met] / images[met])),
        }
        predicted = self.confusion.sum(0)
        per_class: list[dict[str, Any]] = [
            {
                "name": name,
                "images": int(images[i]),
                "predicted": int(predicted[i]),
                "top1": int(right[i]) / int(images[i]) if images[i] else None,
                "top5": int(self.in_top5[i]) / int(images[i]) if images[i] else None,
                "precision": int(right[i]) / int(predicted[i]) if predicted[i] else None,
            }
            for i, name in enumerate(self.classes)
        ]
        from scipy.stats import binomtest  # slow to import

        low, high = binomtest(int(right.sum()), count).proportion_ci(method="wilson")
        protocol = f"{self.protocol}; {count} images, 95 % interval of top-1 {low:.4f} to {high:.4f}"
        table = self.confusion if len(self.classes) <= CONFUSION_LIMIT else None
        return Scores(values, protocol, per_class, table)
