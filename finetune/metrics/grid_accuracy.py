"""Accuracy of every classifier of a grid, and the numbers of the best one, whose choice the protocol states."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from finetune.data.examples import Example
from finetune.metrics.accuracy import Accuracy
from finetune.metrics.metric import Scores, gather_rows
from finetune.predictions import Classes, Classified


@dataclass(frozen=True)
class GridClassified(Classified):
    """probabilities: of the classifier that predicts; top5: int32 [G, 5], the most likely classes of each."""

    top5: np.ndarray


class GridAccuracy:
    """As `Accuracy`, for the classifier with the best top-1 (the first of equal ones) on these same images.

    Args:
        titles: of the classifiers. choose: called with the number of the best one, on every rank.
    """

    def __init__(self, classes: Classes, titles: Sequence[str], *, protocol: str, choose: Callable[[int], None]):
        self.classes, self.titles, self.choose = classes, tuple(titles), choose
        self.protocol = f"{protocol}; the best of {len(titles)} linear classifiers, chosen on these same images"
        self.rows: dict[int, tuple[int, np.ndarray]] = {}

    def update(self, index: int, example: Example, prediction: GridClassified) -> float:
        label = -1 if example.target is None else int(example.target)
        if label < 0:
            return math.nan
        self.rows[index] = (label, prediction.top5)
        return float(prediction.probabilities[label])

    def gather(self) -> None:
        self.rows = gather_rows(self.rows)
        if self.rows:
            self.choose(int(self._right().argmax()))

    def compute(self) -> Scores:
        """
        Raises:
            ValueError: no image has a label.
        """
        found = Accuracy(self.classes, protocol=self.protocol)
        if not self.rows:
            return found.compute()
        right = self._right()
        best = int(right.argmax())
        for label, top5 in self.rows.values():
            found.confusion[label, top5[best, 0]] += 1
            found.in_top5[label] += label in top5[best]
        scores = found.compute()
        grid = {f"top1 {title}": int(count) / len(self.rows) for title, count in zip(self.titles, right, strict=True)}
        chosen = f"{scores.protocol}; chosen: {self.titles[best]}"
        return Scores(scores.values | grid, chosen, scores.per_class, scores.confusion)

    def _right(self) -> np.ndarray:
        """Number of correct images of each classifier, int64 [G]."""
        labels = np.array([label for label, _ in self.rows.values()])
        first = np.stack([top5[:, 0] for _, top5 in self.rows.values()])
        return (first == labels[:, None]).sum(0)
