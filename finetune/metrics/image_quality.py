"""One number per image, by which the best and worst predictions are chosen.

Panoptic quality (Kirillov et al. 2019, eq. 1) of the detections that would be displayed: the sum of the overlaps of
matched pairs over (pairs + half the false detections + half the missed objects). A pair overlaps by more than half.
"""

from __future__ import annotations

import numpy as np

from finetune.data.coco.instances import Instances
from finetune.data.coco.rle import coco
from finetune.predictions import Detected

SHOWN = 0.5  # lowest score of a detection that counts here


def panoptic_quality(truth: Instances, found: Detected, *, masks: bool) -> float:
    """In [0, 1]; 1 for an image without objects and detections. Detections in a crowd are not counted."""
    shown = np.flatnonzero(found.scores >= SHOWN)
    overlap = _overlaps(truth, found, shown, masks)
    same = truth.same_class(found.labels[shown])
    objects = np.flatnonzero(~truth.crowd)
    in_crowd = (np.where(same, overlap, 0.0)[:, truth.crowd] > 0.5).any(axis=1)
    free, total, pairs = set(objects.tolist()), 0.0, 0
    matched = np.zeros(len(shown), dtype=bool)
    for place in np.argsort(-found.scores[shown], kind="stable").tolist():
        choices = [number for number in free if same[place, number] and overlap[place, number] > 0.5]
        if choices:
            best = max(choices, key=lambda number: (overlap[place, number], -number))
            free.remove(best)
            total, pairs, matched[place] = total + float(overlap[place, best]), pairs + 1, True
    false = int((~matched & ~in_crowd).sum())
    counted = pairs + 0.5 * false + 0.5 * len(free)
    return total / counted if counted else 1.0


def _overlaps(truth: Instances, found: Detected, shown: np.ndarray, masks: bool) -> np.ndarray:
    """IoU float64 [shown, objects]; with a crowd, the share of the detection inside it."""
    if not len(shown) or not len(truth):
        return np.zeros((len(shown), len(truth)))
    crowd = truth.crowd.tolist()
    if masks and truth.masks is not None and found.masks is not None:
        return np.asarray(coco.iou([found.masks[place] for place in shown.tolist()], truth.masks, crowd))
    return np.asarray(coco.iou(_xywh(found.boxes[shown]), _xywh(truth.boxes), crowd))


def _xywh(boxes: np.ndarray) -> np.ndarray:
    boxes = boxes.astype(np.float64)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
