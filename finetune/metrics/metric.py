"""What a metric is: updated image by image on every rank, gathered exactly, computed once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from finetune.data.examples import Example
from pretrain.core import distributed


@dataclass(frozen=True)
class Scores:
    """Numbers of one evaluation.

    values      by name; the first is the primary one
    protocol    one sentence: data, size, thresholds, tool and version
    per_class   a row for each class: "name", counts and numbers
    confusion   int64 [K, K], rows are the truth, columns the prediction
    curves      for drawing, for instance {"precision-recall": {class: {"recall": [...], "precision": [...]}}}
    """

    values: dict[str, float]
    protocol: str
    per_class: list[dict[str, Any]] = field(default_factory=list)
    confusion: np.ndarray | None = None
    curves: dict[str, Any] | None = None

    @property
    def primary(self) -> tuple[str, float]:
        """Name and value of the primary number."""
        return next(iter(self.values.items()))


class Metric(Protocol):
    """One pass over a set of examples; every rank has its own counts until `gather`."""

    @property
    def protocol(self) -> str: ...

    def update(self, index: int, example: Example, prediction: Any) -> float:
        """Count example number `index` (its image has no channels, see `Example.without_pixels`).

        Returns:
            the quality of this prediction, higher is better, by which the best and worst pictures are chosen; nan: it
            is neither.
        """
        ...

    def gather(self) -> None:
        """Called once on every rank after the last update: combine the counts of all ranks, exactly."""
        ...

    def compute(self) -> Scores:
        """Called after `gather`, on rank 0 only."""
        ...


Row = TypeVar("Row")


def gather_rows(rows: Mapping[int, Row]) -> dict[int, Row]:
    """The rows of all ranks by the number of their example, each once, in order of the numbers."""
    merged: dict[int, Row] = {}
    for part in distributed.all_gather_object(dict(rows)):
        for index, row in part.items():
            merged.setdefault(index, row)
    return dict(sorted(merged.items()))


def gather_counts(counts: np.ndarray) -> np.ndarray:
    """int64 counts of any shape, summed over ranks, exact in any order.

    Raises:
        ValueError: they are not integers, whose sum would depend on the order.
    """
    if counts.dtype != np.int64:
        raise ValueError(f"counts of {counts.dtype}; only int64 sums are the same for any number of ranks")
    parts = distributed.all_gather_object(counts)
    return np.asarray(np.sum(parts, axis=0, dtype=np.int64))
