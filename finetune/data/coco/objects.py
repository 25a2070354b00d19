"""One annotation of a COCO file to an object, or to the region in which it is ignored.

An object that cannot be used is still in the image: where it is must not be trained as background, nor a detection of
it counted as false. Its region is kept as a crowd.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.coco import rle
from finetune.data.coco.ids import flag, integer
from finetune.data.coco.instances import ANY_CLASS, Instances, no_instances
from finetune.data.examples import DataProblems

ROUNDING = 1.0  # pixels that a box may extend beyond the image before it is reported


@dataclass(frozen=True)
class CocoEntry:
    """One image of the file: width and height in pixels, as annotated."""

    id: int | str
    file_name: str
    height: int
    width: int

    def __str__(self) -> str:
        return f"an image of {self.width} x {self.height} pixels"


@dataclass(frozen=True)
class CocoObject:
    """Of one image; box: x1, y1, x2, y2 in pixels; used: False for a region that is ignored."""

    box: np.ndarray
    label: int
    crowd: bool
    area: float
    id: int
    mask: rle.Rle | None
    used: bool = True


class ObjectReader:
    """Annotations to objects; what is wrong with them becomes findings.

    Args:
        path: of the file, for messages. labels: by category id. masks: keep masks, and leave out objects without one.
    """

    def __init__(self, path: Path, labels: dict[int, int], *, masks: bool, findings: DataProblems) -> None:
        self.path, self.labels, self.masks, self.findings = path, labels, masks, findings

    def read(self, row: dict[str, Any], number: int, entry: CocoEntry) -> CocoObject | None:
        """The object `number` of an image, or its region if it cannot be used; None if it has no pixel in the image."""

        def report(kind: str, reason: str, *, lost: int = 1) -> None:
            text = f"in image {entry.id} ({entry.file_name}): {reason}"
            self.findings.add(kind, str(self.path), number, text, lost=lost)

        given = row.get("bbox")
        mask, bad_mask = None, ""
        if self.masks or given is None:
            try:
                mask, stray = rle.from_segmentation(row.get("segmentation"), (entry.height, entry.width))
                for piece in stray:
                    report("bad polygon piece", f"{piece}; the others are used", lost=0)
            except ValueError as error:
                bad_mask = str(error) if self.masks else ""
        box, problem = (rle.boxes([mask])[0], None) if given is None and mask is not None else _clipped(given, entry)
        if problem is not None and problem[0] == "box over the border":
            report(*problem, lost=0)
            problem = None
        category = row.get("category_id")
        category_id = integer(category)
        label = ANY_CLASS if category_id is None else self.labels.get(category_id, ANY_CLASS)
        if label == ANY_CLASS:
            problem = "class out of range", f"category_id {category!r} is not among the categories"
        elif bad_mask:
            problem = "bad mask", bad_mask
        elif problem is None and mask is not None and not _touch(box, (around := rle.boxes([mask])[0])):
            problem = "mask outside its box", f"bbox {given}, the mask's box is {around.tolist()}"
        crowd = flag(row.get("iscrowd"))
        if problem is not None:
            report(*problem)
            return self._ignored(box, mask, label, number, entry)
        area = row.get("area")
        if not isinstance(area, int | float) or not area > 0:
            area = float(rle.areas([mask])[0]) if mask else float(np.prod(box[2:] - box[:2]))
        return CocoObject(box.astype(np.float32), label, crowd, float(area), number, mask if self.masks else None)

    def stack(self, objects: list[CocoObject]) -> Instances:
        """The objects of one image."""
        empty = no_instances(masks=self.masks)
        return Instances(
            boxes=np.stack([found.box for found in objects]),
            labels=np.array([found.label for found in objects], dtype=empty.labels.dtype),
            crowd=np.array([found.crowd for found in objects]),
            areas=np.array([found.area for found in objects], dtype=empty.areas.dtype),
            ids=np.array([found.id for found in objects], dtype=empty.ids.dtype),
            masks=[found.mask for found in objects if found.mask is not None] if self.masks else None,
        )

    def _ignored(
        self, box: np.ndarray, mask: rle.Rle | None, label: int, number: int, entry: CocoEntry
    ) -> CocoObject | None:
        """Where an unusable object is: in its box and mask; anywhere in the image if it has neither."""
        around = rle.boxes([mask])[0] if mask is not None else np.full(4, np.nan)
        known = [place for place in (box, around) if np.isfinite(place).all()]
        whole = np.array([0, 0, entry.width, entry.height], dtype=np.float64)
        low, high = (known[0].copy(), known[0].copy()) if known else (whole, whole)
        for place in known:
            low, high = np.minimum(low, place), np.maximum(high, place)
        x1, y1 = np.floor(np.clip(low[:2], 0, whole[2:]))
        x2, y2 = np.ceil(np.clip(high[2:], 0, whole[2:]))
        if x2 <= x1 or y2 <= y1:
            return None
        region, shape = np.array([x1, y1, x2, y2], dtype=np.float32), None
        if self.masks:
            fits = mask is not None and (np.isnan(box).any() or _touch(box, around))
            corners = [float(value) for value in (x1, y1, x2, y1, x2, y2, x1, y2)]
            shape = mask if fits else rle.from_segmentation([corners], (entry.height, entry.width))[0]
        return CocoObject(region, label, True, float((x2 - x1) * (y2 - y1)), number, shape, used=False)


def _clipped(given: Any, entry: CocoEntry) -> tuple[np.ndarray, tuple[str, str] | None]:
    """x1, y1, x2, y2 in the image from x, y, width, height, and what is wrong with it; nan if it is no box."""
    box = _box(given)
    if box is None:
        return np.full(4, np.nan), ("bad box", f"bbox {given!r} is not four finite numbers x, y, width, height")
    if box[2] <= box[0] or box[3] <= box[1]:
        return box, ("empty box", f"bbox {given} has no area")
    inside = np.clip(box, 0, [entry.width, entry.height] * 2)
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        return inside, ("box outside the image", f"bbox {given} in {entry}")
    if np.abs(inside - box).max() > ROUNDING:
        return inside, ("box over the border", f"bbox {given} in {entry}: clipped to the image")
    return inside, None


def _box(given: Any) -> np.ndarray | None:
    """x1, y1, x2, y2 from x, y, width, height; None if it is not four finite numbers."""
    if not isinstance(given, list | tuple) or len(given) != 4:
        return None
    try:
        x, y, width, height = (float(value) for value in given)
    except (TypeError, ValueError):
        return None
    box = np.array([x, y, x + width, y + height], dtype=np.float64)
    return box if np.isfinite(box).all() else None


def _touch(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((np.minimum(a[2:], b[2:]) > np.maximum(a[:2], b[:2])).all())
