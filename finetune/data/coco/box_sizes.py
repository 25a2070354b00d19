"""Sizes of annotated boxes in the pixels that a detector sees, and how well anchors fit them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.data.subset import Subset

SHARES = (10, 25, 50, 75, 90)  # percentiles that are printed
FITS = 0.5  # overlap (IoU) of a box with the best anchor around the same centre, from which it fits
MISSED = 0.25  # share of boxes without a fitting anchor, above which a configuration gets a warning


@dataclass(frozen=True)
class BoxSizes:
    """The objects of a set that are no crowd.

    boxes   float64 [n, 2], width and height of each in pixels of its image
    images  int64 [n], number of its image
    sizes   int64 [m, 2], height and width of each image
    labels  int64 [n], from 1
    """

    boxes: np.ndarray
    images: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray

    def fitted(self, canvas: tuple[int, int]) -> np.ndarray:
        """Width and height [n, 2] of the boxes where each image is fitted into `canvas` = (height, width)."""
        return self.boxes * (np.array(canvas) / self.sizes).min(axis=1)[self.images, None]


def box_sizes(examples: Any) -> BoxSizes:
    """Of a set of COCO examples, or of a part of it."""
    whole: Any = examples.whole if isinstance(examples, Subset) else examples
    part = examples.indices if isinstance(examples, Subset) else None
    table = whole.table
    images = np.repeat(np.arange(len(table)), np.diff(table.ends, prepend=0))
    kept = ~table.crowd if part is None else ~table.crowd & np.isin(images, part)
    boxes = table.boxes[kept].astype(np.float64)
    used = np.arange(len(table)) if part is None else part
    places = np.searchsorted(used, images[kept])
    return BoxSizes(boxes[:, 2:] - boxes[:, :2], places, table.sizes[used], table.labels[kept])


def sides(boxes: np.ndarray) -> np.ndarray:
    """Square roots of the areas of boxes [n, 2]."""
    return np.sqrt(boxes.prod(axis=1))


def best_overlaps(boxes: np.ndarray, anchors: Sequence[float], ratios: Sequence[float]) -> np.ndarray:
    """Overlap (IoU) of each box [n, 2] with the best anchor around the same centre.

    Args:
        anchors: square roots of areas. ratios: height / width.
    """
    best = np.zeros(len(boxes))
    for side in anchors:
        for ratio in ratios:
            anchor = np.array([side / ratio**0.5, side * ratio**0.5])
            common = np.minimum(boxes, anchor).prod(axis=1)
            best = np.maximum(best, common / (boxes.prod(axis=1) + side**2 - common))
    return best


def spread(low: float, high: float, count: int) -> list[float]:
    """Sides of `count` anchors, in the middle of equal steps of log size from `low` to `high`."""
    steps = low * (high / low) ** ((2 * np.arange(count) + 1) / (2 * count))
    return [round(float(side)) if side >= 10 else round(float(side), 1) for side in steps]


def percentiles_text(values: np.ndarray) -> str:
    """ "10 % 8, 25 % 11, ..." """
    return ", ".join(f"{p} % {value:.3g}" for p, value in zip(SHARES, np.percentile(values, SHARES), strict=True))


def anchor_warnings(
    found: BoxSizes, canvas: tuple[int, int], anchors: Sequence[float], ratios: Sequence[float]
) -> list[str]:
    """What is wrong with the anchors of a detector whose images are fitted into `canvas` for prediction, in lines."""
    boxes = found.fitted(canvas)
    missed = float((best_overlaps(boxes, anchors, ratios) < FITS).mean())
    if missed <= MISSED:
        return []
    low, high = np.percentile(sides(boxes), (10, 90))
    fits = spread(float(low), float(high), len(anchors))
    shapes = boxes[:, 1] / boxes[:, 0]
    return [
        f"warning: task.head.anchors: {missed:.0%} of the boxes of data.train overlap no anchor by half (IoU), "
        "wherever it is; they are hardly learnt",
        f"  sides of boxes, fitted into {canvas[0]} x {canvas[1]} px: {percentiles_text(sides(boxes))}",
        f"  sides of anchors: {', '.join(f'{side:g}' for side in anchors)}",
        f"  height / width of boxes: {percentiles_text(shapes)}; of anchors: {', '.join(f'{r:g}' for r in ratios)}",
        f"  task.head.anchors={fits} spans the 10th to the 90th percentile; "
        "`fovea finetune init detection` chooses levels, sizes and ratios together",
    ]
