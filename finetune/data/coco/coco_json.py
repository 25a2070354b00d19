"""A COCO annotation file, checked: every entry that cannot be used in training is reported and left out.

Lin et al. 2014, "Microsoft COCO"; https://cocodataset.org/#format-data. Category ids may be any integers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.coco import rle
from finetune.data.coco.instances import Instances, no_instances
from finetune.data.examples import DataProblems
from finetune.predictions import Classes

ROUNDING = 1.0  # pixels that a box may extend beyond the image before it is reported
_KEYS = {"images": list, "annotations": list, "categories": list}


@dataclass(frozen=True)
class CocoEntry:
    """One image of the file: width and height in pixels, as annotated."""

    id: int | str
    file_name: str
    height: int
    width: int


@dataclass(frozen=True)
class CocoFile:
    """The content of a file after the checks: classes in the order of their category ids (label i + 1 is classes[i]),
    and `instances` by image id, of images that have any."""

    path: Path
    classes: Classes
    entries: list[CocoEntry]
    instances: dict[int | str, Instances]


def read_coco(path: Path, *, masks: bool, findings: DataProblems, like: Classes | None = None) -> CocoFile:
    """Read and check `path`.

    Args:
        masks: keep masks, and leave out objects without one.
        findings: gets the problem of each wrong entry. These are left out, except boxes that were clipped.
        like: classes of the training set, which give the labels.

    Raises:
        ValueError: it is no COCO file, has no category, repeats ids, or has categories that are not among `like`.
    """
    data = load(path)
    classes = _classes(path, data["categories"])
    if like is not None:
        classes = _same_classes(path, classes, like)
    entries = _entries(path, data["images"], findings)
    rows = _by_image(path, data["annotations"], {entry.id for entry in entries}, findings)
    labels = {category: label for label, category in enumerate(classes.category_ids, start=1)}
    instances: dict[int | str, Instances] = {}
    for entry in entries:
        objects = [_object(path, row, entry, labels, masks, findings) for row in rows.get(entry.id, ())]
        kept = [found for found in objects if found is not None]
        if kept:
            instances[entry.id] = _stack(kept, masks)
    return CocoFile(path, classes, entries, instances)


@dataclass(frozen=True)
class _Object:
    box: np.ndarray
    label: int
    crowd: bool
    area: float
    id: int
    mask: rle.Rle | None


def load(path: Path) -> dict[str, Any]:
    """A COCO file as it is, of instances or panoptic.

    Raises:
        ValueError: it cannot be read, is not JSON, or lacks one of the lists.
    """
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot read the annotations: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected COCO's {{images, annotations, categories}}, got a {type(data).__name__}")
    for key, kind in _KEYS.items():
        if not isinstance(data.get(key), kind):
            have = ", ".join(list(data)[:10])
            raise ValueError(f"{path}: no list named {key!r}; a COCO file has one (this one has: {have})")
    return data


def _classes(path: Path, rows: Sequence[Any]) -> Classes:
    try:
        pairs = sorted((int(row["id"]), str(row["name"])) for row in rows)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: a category needs an integer id and a name: {error!r}") from error
    if not pairs:
        raise ValueError(f"{path}: categories is empty; a detector needs at least one")
    twice = _first_twice([category for category, _ in pairs])
    if twice is not None:
        raise ValueError(f"{path}: category id {twice} is given more than once")
    return Classes([name for _, name in pairs], [category for category, _ in pairs])


def _same_classes(path: Path, have: Classes, like: Classes) -> Classes:
    """`like`; ValueError if this file has an id that `like` lacks, or another name for an id of `like`."""
    names = dict(zip(like.category_ids, like, strict=True))
    other = [
        f"{category} is {name!r} here, {names.get(category, 'not there')!r} in the training set"
        for category, name in zip(have.category_ids, have, strict=True)
        if names.get(category) != name
    ]
    if other:
        raise ValueError(f"{path}: categories are not those of the training set: " + "; ".join(other[:10]))
    return like


def _entries(path: Path, rows: Sequence[Any], findings: DataProblems) -> list[CocoEntry]:
    entries: list[CocoEntry] = []
    for place, row in enumerate(rows):
        try:
            entry = CocoEntry(row["id"], str(row["file_name"]), int(row["height"]), int(row["width"]))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            findings.add("bad image entry", str(path), place, f"images[{place}] has no usable {error}")
            continue
        if not isinstance(entry.id, int | str) or entry.height < 1 or entry.width < 1:
            findings.add("bad image entry", str(path), place, f"images[{place}]: id {entry.id!r}, {_size(entry)}")
            continue
        entries.append(entry)
    twice = _first_twice([entry.id for entry in entries])
    if twice is not None:
        raise ValueError(f"{path}: image id {twice} is given more than once; annotations cannot be assigned to images")
    return entries


def _by_image(
    path: Path, rows: Sequence[Any], known: set[int | str], findings: DataProblems
) -> dict[int | str, list[dict[str, Any]]]:
    """Annotations by image, in the order of the file."""
    found: dict[int | str, list[dict[str, Any]]] = {}
    ids: set[Any] = set()
    for place, row in enumerate(rows):
        if not isinstance(row, dict) or type(row.get("id")) is not int or abs(row["id"]) >= 2**63:
            findings.add("bad annotation", str(path), place, f"annotations[{place}] has no integer id of 64 bits")
        elif row["id"] in ids:
            findings.add("repeated annotation id", str(path), row["id"], f"annotations[{place}] repeats it")
        elif not isinstance(image := row.get("image_id"), Hashable) or image not in known:
            findings.add("unknown image", str(path), row["id"], f"image_id {image!r} is not among the images")
        else:
            ids.add(row["id"])
            found.setdefault(image, []).append(row)  # pyright: ignore[reportArgumentType]
    return found


def _object(
    path: Path, row: dict[str, Any], entry: CocoEntry, labels: dict[int, int], masks: bool, findings: DataProblems
) -> _Object | None:
    """One annotation, or None after reporting its problem."""

    def refuse(kind: str, reason: str) -> None:
        findings.add(kind, str(path), row["id"], f"in image {entry.id} ({entry.file_name}): {reason}")

    category = row.get("category_id")
    label = labels.get(category) if isinstance(category, Hashable) else None  # pyright: ignore[reportArgumentType]
    if label is None:
        return refuse("class out of range", f"category_id {category!r} is not among the categories")
    size, mask = (entry.height, entry.width), None
    if masks:
        try:
            mask = rle.from_segmentation(row.get("segmentation"), size)
        except ValueError as error:
            return refuse("bad mask", str(error))
    given = row.get("bbox")
    if given is None and mask is not None:
        box = rle.boxes([mask])[0]
    else:
        box = _box(given)
        if box is None:
            return refuse("bad box", f"bbox {given!r} is not four finite numbers x, y, width, height")
        if box[2] <= box[0] or box[3] <= box[1]:
            return refuse("empty box", f"bbox {given} has no area")
        inside = np.clip(box, 0, [entry.width, entry.height] * 2)
        if inside[2] <= inside[0] or inside[3] <= inside[1]:
            return refuse("box outside the image", f"bbox {given} in {_size(entry)}")
        if np.abs(inside - box).max() > ROUNDING:
            refuse("box over the border", f"bbox {given} in {_size(entry)}: clipped to the image")
        box = inside
    if mask is not None and not _touch(box, rle.boxes([mask])[0]):
        return refuse("mask outside its box", f"bbox {given}, the mask's box is {rle.boxes([mask])[0].tolist()}")
    area = row.get("area")
    if not isinstance(area, int | float) or area <= 0:
        area = float(rle.areas([mask])[0]) if mask else float(np.prod(box[2:] - box[:2]))
    return _Object(box.astype(np.float32), label, bool(row.get("iscrowd", 0)), float(area), row["id"], mask)


def _box(given: Any) -> np.ndarray | None:
    """x1, y1, x2, y2 from x, y, width, height; None if it is not four finite numbers."""
    if not isinstance(given, list | tuple) or len(given) != 4:
        return None
    if not all(isinstance(value, int | float) for value in given) or not np.isfinite(given).all():
        return None
    x, y, width, height = given
    return np.array([x, y, x + width, y + height], dtype=np.float64)


def _touch(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((np.minimum(a[2:], b[2:]) > np.maximum(a[:2], b[:2])).all())


def _stack(objects: Sequence[_Object], masks: bool) -> Instances:
    empty = no_instances(masks=masks)
    return Instances(
        boxes=np.stack([found.box for found in objects]),
        labels=np.array([found.label for found in objects], dtype=empty.labels.dtype),
        crowd=np.array([found.crowd for found in objects]),
        areas=np.array([found.area for found in objects], dtype=empty.areas.dtype),
        ids=np.array([found.id for found in objects], dtype=empty.ids.dtype),
        masks=[found.mask for found in objects if found.mask is not None] if masks else None,
    )


def _first_twice(values: Sequence[Any]) -> Any:
    return next((value for value, count in Counter(values).items() if count > 1), None)


def _size(entry: CocoEntry) -> str:
    return f"an image of {entry.width} x {entry.height} pixels"
