"""Predictions of the tasks for one image, in the coordinates of the original image, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Json = Any  # accepted by json.dumps
RLE = Mapping[str, Any]  # of pycocotools, compressed: {"size": [h, w], "counts": bytes}


class Classes(tuple[str, ...]):
    """The names of the classes, in the order of the labels; `category_ids` are their numbers in the user's files.

    Otherwise a plain tuple of names. Detection labels are 1-based: names[0] belongs to label 1, 0 is the background.
    """

    category_ids: tuple[int, ...]

    def __new__(cls, names: Sequence[str] = (), category_ids: Sequence[int] | None = None) -> Classes:
        made = super().__new__(cls, names)
        made.category_ids = tuple(range(len(made))) if category_ids is None else tuple(category_ids)
        if len(made.category_ids) != len(made):
            raise ValueError(f"{len(made)} classes, but {len(made.category_ids)} category ids")
        return made


class Prediction(Protocol):
    def as_json(self, id: str | int, classes: Classes) -> Json:
        """For a results file; `id` is the example's."""
        ...


@dataclass(frozen=True)
class Classified:
    """probabilities: float32 [K]."""

    probabilities: np.ndarray

    def as_json(self, id: str | int, classes: Classes) -> Json:
        """{"id", "label", "class", "probabilities": {class: p} of the five most likely}."""
        order = np.argsort(-self.probabilities, kind="stable")[:5].tolist()
        best = order[0]
        return {
            "id": id,
            "label": classes.category_ids[best],
            "class": classes[best],
            "probabilities": {classes[i]: round(float(self.probabilities[i]), 6) for i in order},
        }


@dataclass(frozen=True)
class Labelled:
    """Any number of labels: probabilities float32 [K], each of one label; those from `threshold` on are predicted."""

    probabilities: np.ndarray
    threshold: float

    def as_json(self, id: str | int, classes: Classes) -> Json:
        """{"id", "labels", "classes": those predicted, the most likely first, "probabilities": {class: p} of all}."""
        order = np.argsort(-self.probabilities, kind="stable").tolist()
        found = [i for i in order if self.probabilities[i] >= self.threshold]
        return {
            "id": id,
            "labels": [classes.category_ids[i] for i in found],
            "classes": [classes[i] for i in found],
            "probabilities": {classes[i]: round(float(self.probabilities[i]), 6) for i in order},
        }


@dataclass(frozen=True)
class Detected:
    """Objects, best first: boxes float32 [n, 4] xyxy in pixels, labels int64 [n] 1-based, scores float32 [n], and
    masks, each an RLE of the image's size, or None."""

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    masks: Sequence[RLE] | None = None

    def as_json(self, id: str | int, classes: Classes) -> Json:
        """Rows of COCO's results format: boxes xywh, the category ids of the user's annotation file."""
        rows = []
        for i in range(len(self.boxes)):
            x0, y0, x1, y1 = (float(v) for v in self.boxes[i])
            row: dict[str, Any] = {
                "image_id": id,
                "category_id": classes.category_ids[int(self.labels[i]) - 1],
                "bbox": [round(value, 5) for value in (x0, y0, x1 - x0, y1 - y0)],
                "score": float(str(self.scores[i])),  # the shortest number: no two scores become one
            }
            if self.masks is not None:
                counts = self.masks[i]["counts"]
                text = counts.decode("ascii") if isinstance(counts, bytes) else counts
                row["segmentation"] = {"size": [int(v) for v in self.masks[i]["size"]], "counts": text}
            rows.append(row)
        return rows


@dataclass(frozen=True)
class ClassMap:
    """classes: uint8 [H, W], an index into the task's classes for each pixel; 255: void."""

    classes: np.ndarray

    def as_json(self, id: str | int, classes: Classes) -> Json:
        """{"id", "size": [h, w], "fraction": {class: share of the pixels}}; the map itself is a PNG."""
        values, counts = np.unique(self.classes, return_counts=True)
        shares = {
            classes[int(v)]: round(int(n) / self.classes.size, 6)
            for v, n in zip(values, counts, strict=True)
            if int(v) < len(classes)
        }
        return {"id": id, "size": list(self.classes.shape), "fraction": shares}


@dataclass(frozen=True)
class DepthMap:
    """depth: float32 [H, W] metres."""

    depth: np.ndarray

    def as_json(self, id: str | int, classes: Classes) -> Json:
        """{"id", "size": [h, w], "metres": {"min", "median", "max"}}; the map itself is a 16-bit PNG."""
        low, middle, high = (round(float(v), 4) for v in np.quantile(self.depth, (0.0, 0.5, 1.0)))
        return {"id": id, "size": list(self.depth.shape), "metres": {"min": low, "median": middle, "max": high}}
