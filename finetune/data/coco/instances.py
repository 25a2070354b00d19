"""The objects of one image: boxes, labels and masks, as detection reads, augments and scores them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from finetune.data.coco.rle import Rle

ANY_CLASS = 0  # the label of an ignored region whose class is not known


@dataclass(frozen=True)
class Instances:
    """n objects of an image.

    Attributes:
        boxes: float32 [n, 4], x1, y1, x2, y2 in pixels, x2 and y2 exclusive (a box of one pixel has sides of 1).
        labels: int64 [n], counted from 1; 0 (`ANY_CLASS`) only of crowds.
        crowd: bool [n]: a region of many objects, or of one that cannot be used; ignored in training, as are detections
            in it in evaluation.
        areas: float32 [n], pixels of the object, which decide whether AP counts it as small, medium or large.
        ids: int64 [n], as annotated.
        masks: an RLE of the complete image for each, or None if the annotations have none.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    ids: np.ndarray
    masks: list[Rle] | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def same_class(self, labels: np.ndarray) -> np.ndarray:
        """Whether each of m detections has the class of each object, bool [m, n]."""
        return (labels[:, None] == self.labels[None]) | (self.labels == ANY_CLASS)[None]

    def select(self, chosen: np.ndarray) -> Instances:
        """The objects `chosen` (bool [n], or indices), in that order."""
        places = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        masks = None if self.masks is None else [self.masks[place] for place in places.tolist()]
        arrays = (self.boxes, self.labels, self.crowd, self.areas, self.ids)
        return Instances(*(array[places] for array in arrays), masks=masks)


def no_instances(*, masks: bool) -> Instances:
    """An image without objects."""
    numbers = np.zeros(0, dtype=np.int64)
    boxes, areas = np.zeros((0, 4), dtype=np.float32), np.zeros(0, dtype=np.float32)
    return Instances(boxes, numbers, numbers.astype(bool), areas, numbers, masks=[] if masks else None)
