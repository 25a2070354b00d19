"""COCO's average precision of boxes and masks, computed by the reference tool from rows gathered over ranks.

Lin et al. 2014, "Microsoft COCO"; pycocotools is the reference, faster-coco-eval (up to 8 times as fast) equals it
except for rounding (1e-12). Ranks gather objects and detections of complete images, each image once, so that any number
of ranks gives exactly the result of one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from finetune.data.coco.instances import Instances
from finetune.data.examples import Example
from finetune.metrics import coco_tools
from finetune.metrics.image_quality import panoptic_quality
from finetune.metrics.metric import Scores, gather_rows
from finetune.predictions import Classes, Detected

CURVES_AT = (0.5, 0.75)  # IoU thresholds of the precision-recall curves
_TITLES = {"bbox": "box", "segm": "mask"}


@dataclass(frozen=True)
class _ImageRow:
    """One image."""

    size: tuple[int, int]
    truth: Instances
    found: Detected


@dataclass
class AveragePrecision:
    """Box AP, and mask AP if both sides have masks, over IoU 0.50 to 0.95.

    Args:
        classes: of the labels. masks: evaluate masks too.
        data: the evaluated images and their size, for the protocol.
        max_detections: per image, best first; COCO's is 100.
        tool: "auto" is faster-coco-eval if it is installed, else pycocotools.
    """

    classes: Classes
    masks: bool
    data: str
    max_detections: int = 100
    tool: coco_tools.Tool = "auto"
    _rows: dict[int, _ImageRow] = field(default_factory=dict, init=False)

    @property
    def protocol(self) -> str:
        kinds = "box and mask AP" if self.masks else "box AP"
        return (
            f"COCO {kinds} over IoU 0.50:0.05:0.95, all areas, at most {self.max_detections} detections an image, "
            f"{self.data}; {coco_tools.describe(self.tool)}"
        )

    def update(self, index: int, example: Example, prediction: Detected) -> float:
        """Returns the panoptic quality of this image, see `image_quality`."""
        height, width = example.image.shape[:2]
        self._rows[index] = _ImageRow((height, width), example.target, prediction)
        return panoptic_quality(example.target, prediction, masks=self.masks)

    def gather(self) -> None:
        self._rows = gather_rows(self._rows)

    def compute(self) -> Scores:
        """Values "box_ap", "box_ap50", ... and "mask_ap", ...; values that no object
        determines (AP of large objects if there are none) are left out.

        Raises:
            ValueError: no image has an object, so that AP is not defined.
        """
        if not any((~row.truth.crowd).any() for row in self._rows.values()):
            raise ValueError(f"{self.data}: none of the {len(self._rows)} images has an object; AP is not defined")
        values: dict[str, float] = {}
        curves: dict[str, Any] = {}
        per_class = self._counts()
        for kind in ("bbox", "segm") if self.masks else ("bbox",):
            title = _TITLES[kind]
            table = self._evaluate(kind)
            values |= {f"{title}_{name}": value for name, value in table.summary().items()}
            for row, numbers in zip(per_class, table.of_classes(), strict=True):
                row |= {f"{title}_{name}": value for name, value in numbers.items()}
            for iou in CURVES_AT:
                curves[f"{title}, IoU {iou:.2f}"] = table.curves(iou, self.classes)
        return Scores(values, self.protocol, per_class=per_class, curves=curves)

    def _counts(self) -> list[dict[str, Any]]:
        """A row for each class: its numbers of objects and detections."""
        labels = range(1, len(self.classes) + 1)
        truth = np.concatenate([row.truth.labels[~row.truth.crowd] for row in self._rows.values()])
        found = np.concatenate([row.found.labels for row in self._rows.values()])
        return [
            {
                "name": name,
                "objects": int((truth == label).sum()),
                "detections": int((found == label).sum()),
            }
            for name, label in zip(self.classes, labels, strict=True)
        ]

    def _evaluate(self, kind: coco_tools.Kind) -> coco_tools.Table:
        images, objects, detections = [], [], []
        for number, (_, row) in enumerate(sorted(self._rows.items()), start=1):
            images.append({"id": number, "height": row.size[0], "width": row.size[1]})
            objects += coco_tools.objects(row.truth, number, kind, len(self.classes))
            detections += coco_tools.detections(row.found, number, kind)
        data = coco_tools.Data(images, objects, detections, num_classes=len(self.classes))
        return coco_tools.evaluate(data, kind, max_detections=self.max_detections, tool=self.tool)
