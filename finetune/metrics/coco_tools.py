"""One function for pycocotools and faster-coco-eval, and the numbers that are computed from their tables."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from finetune.data.coco.instances import ANY_CLASS, Instances
from finetune.predictions import Detected

Tool = Literal["auto", "pycocotools", "faster-coco-eval"]
Kind = Literal["bbox", "segm"]
AREAS = ("all", "small", "medium", "large")  # of objects: under 32^2 pixels, under 96^2, above


@dataclass(frozen=True)
class Data:
    """Rows of COCO's formats; category ids are 1 to num_classes."""

    images: list[dict[str, Any]]
    objects: list[dict[str, Any]]
    detections: list[dict[str, Any]]
    num_classes: int


@dataclass(frozen=True)
class Table:
    """Accumulated results of the tools; -1 where there is no object.

    Attributes:
        precision: float64 [thresholds, recalls, classes, areas], at the IoU `thresholds` and the recalls `recalls`.
        recall: float64 [thresholds, classes, areas], with all detections.
        recall_of: recall of all areas with 1, 10 and all detections per image, [thresholds, classes].
    """

    precision: np.ndarray
    recall: np.ndarray
    recall_of: dict[int, np.ndarray]
    thresholds: np.ndarray
    recalls: np.ndarray

    def summary(self) -> dict[str, float]:
        """AP, AP at IoU 0.5 and 0.75, AP by area, and average recall by detections per image, as COCO's twelve numbers.

        Numbers that no object determines are left out.
        """
        values = {
            "ap": _mean(self.precision[..., 0]),
            "ap50": _mean(self.precision[self._at(0.5), ..., 0]),
            "ap75": _mean(self.precision[self._at(0.75), ..., 0]),
            **{f"ap_{area}": _mean(self.precision[..., i]) for i, area in enumerate(AREAS) if i},
            **{f"ar{limit}": _mean(recall) for limit, recall in self.recall_of.items()},
            **{f"ar_{area}": _mean(self.recall[..., i]) for i, area in enumerate(AREAS) if i},
        }
        return {name: value for name, value in values.items() if value is not None}

    def of_classes(self) -> list[dict[str, float]]:
        """AP and AP at IoU 0.5 of each class; empty for a class without objects."""
        rows = []
        for number in range(self.precision.shape[2]):
            of_class = self.precision[:, :, number, 0]
            values = {"ap": _mean(of_class), "ap50": _mean(of_class[self._at(0.5)])}
            rows.append({name: value for name, value in values.items() if value is not None})
        return rows

    def curves(self, iou: float, names: Sequence[str]) -> dict[str, dict[str, list[float]]]:
        """Precision over recall at an IoU threshold, of every class that has objects."""
        curves = {}
        for number, name in enumerate(names):
            precision = self.precision[self._at(iou), :, number, 0]
            if (precision >= 0).all():
                curves[name] = {"recall": self.recalls.tolist(), "precision": precision.tolist()}
        return curves

    def _at(self, iou: float) -> int:
        return int(np.flatnonzero(np.isclose(self.thresholds, iou))[0])


def describe(tool: Tool) -> str:
    """Name and version of the tool that `evaluate` uses."""
    name = _chosen(tool)
    return f"{name} {importlib.metadata.version(name)}"


def evaluate(data: Data, kind: Kind, *, max_detections: int = 100, tool: Tool = "auto") -> Table:
    """Match detections to objects and accumulate precision and recall.

    Raises:
        ValueError: the tool is not installed.
    """
    limits = sorted({1, min(10, max_detections), max_detections})
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        run = _tool(data, kind, _chosen(tool))
        run.params.maxDets = limits
        run.evaluate()
        run.accumulate()
    precision, recall = (np.ascontiguousarray(run.eval[key]) for key in ("precision", "recall"))
    return Table(
        precision=precision[..., -1],
        recall=recall[..., -1],
        recall_of={limit: recall[:, :, 0, place] for place, limit in enumerate(limits)},
        thresholds=np.asarray(run.params.iouThrs),
        recalls=np.asarray(run.params.recThrs),
    )


def objects(truth: Instances, image: int, kind: Kind, num_classes: int) -> list[dict[str, Any]]:
    """COCO annotations of one image, without ids (`evaluate` numbers them); a region of any class is one of each."""
    rows = []
    for place, (x1, y1, x2, y2) in enumerate(truth.boxes.astype(np.float64).tolist()):
        row = {
            "image_id": image,
            "category_id": int(truth.labels[place]),
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": float(truth.areas[place]),
            "iscrowd": int(truth.crowd[place]),
        }
        row |= _mask(truth.masks, place, kind)
        labels = range(1, num_classes + 1) if row["category_id"] == ANY_CLASS else (row["category_id"],)
        rows += [row | {"category_id": label} for label in labels]
    return rows


def detections(found: Detected, image: int, kind: Kind) -> list[dict[str, Any]]:
    """COCO detections of one image. Their area, which AP by size reads, is that of the box also where masks are
    evaluated: `loadRes` of pycocotools gives a row with a box and a mask that one."""
    rows = []
    for place, (x1, y1, x2, y2) in enumerate(found.boxes.astype(np.float64).tolist()):
        row = {
            "image_id": image,
            "category_id": int(found.labels[place]),
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": (x2 - x1) * (y2 - y1),
            "iscrowd": 0,
            "score": float(found.scores[place]),
        }
        rows.append(row | _mask(found.masks, place, kind))
    return rows


def _mask(masks: Sequence[Any] | None, place: int, kind: Kind) -> dict[str, Any]:
    if kind == "bbox":
        return {}
    if masks is None:
        raise ValueError("mask AP needs masks on both sides: the annotations or the predictions have none")
    return {"segmentation": dict(masks[place])}


def _chosen(tool: Tool) -> str:
    faster = importlib.util.find_spec("faster_coco_eval") is not None
    if tool == "faster-coco-eval" and not faster:
        raise ValueError("faster-coco-eval is not installed; pip install faster-coco-eval, or use pycocotools")
    return "faster-coco-eval" if faster and tool != "pycocotools" else "pycocotools"


def _tool(data: Data, kind: Kind, name: str) -> Any:
    """The evaluator over both sides. Ids start at 1: the tools treat a match with id 0 as no match."""
    if name == "faster-coco-eval":
        module = importlib.import_module("faster_coco_eval")
        new_side, new_evaluator = module.COCO, module.COCOeval_faster
    else:
        new_side = importlib.import_module("pycocotools.coco").COCO
        new_evaluator = importlib.import_module("pycocotools.cocoeval").COCOeval
    sides = []
    for rows in (data.objects, data.detections):
        side = new_side()
        side.dataset = {
            "images": data.images,
            "categories": [{"id": number, "name": str(number)} for number in range(1, data.num_classes + 1)],
            "annotations": [row | {"id": place} for place, row in enumerate(rows, start=1)],
        }
        side.createIndex()
        sides.append(side)
    return new_evaluator(*sides, kind)


def _mean(values: np.ndarray) -> float | None:
    """The mean over entries that some object determines."""
    determined = values[values > -1]
    return float(determined.mean()) if determined.size else None
