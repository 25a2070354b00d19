"""Converted annotations as COCO json, or as a csv of labels."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.data.classification import SEPARATOR
from finetune.data.coco.objects import CocoEntry, CocoObject, ObjectReader
from finetune.data.convert.annotated import Shape
from finetune.data.convert.pictures import Picture
from finetune.data.examples import DataProblems


def numbered_classes(pictures: Sequence[Picture], given: Mapping[int, str] | None) -> dict[int, str]:
    """The classes by category id: as given, else the names that occur, from 1 in their order."""
    if given is not None:
        return dict(given)
    return dict(enumerate(sorted({shape.label for picture in pictures for shape in picture.shapes}), 1))


def coco(
    pictures: Sequence[Picture],
    classes: Mapping[int, str],
    findings: DataProblems,
    *,
    background: Sequence[tuple[str, tuple[int, int]]] = (),
    description: str,
) -> tuple[dict[str, Any], Counter[str]]:
    """A COCO file, and the number of objects of each class.

    Objects are checked as the reader of training does; one that cannot be used, but has a place, becomes a region that
    is ignored (iscrowd). An image all of whose objects are lost is left out: it is no background.

    Args:
        background: name and size of further images without objects.
    """
    ids = {name: id for id, name in classes.items()}
    labels = {id: label for label, id in enumerate(sorted(classes), 1)}
    masks = any(shape.polygons or shape.mask for picture in pictures for shape in picture.shapes)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    for picture in pictures:
        height, width = picture.size
        entry = CocoEntry(picture.name, picture.name, height, width)
        rows: list[dict[str, Any]] = []
        for place, shape in enumerate(picture.shapes, 1):
            if shape.label not in ids:
                text = f"{shape.label} of {picture.name} is not one of the {len(classes)} classes"
                findings.add("unknown class", picture.annotated.source, place, text, lost=1)
                continue
            row = _row(shape, ids[shape.label])
            reader = ObjectReader(
                Path(picture.annotated.source), labels, masks="segmentation" in row, findings=findings
            )
            found = reader.read(row, place, entry)
            if found is not None:
                rows.append(_checked(row, found, masks=masks))
                counts[shape.label] += not found.crowd
        if (picture.shapes or picture.annotated.problems) and all(row["iscrowd"] for row in rows):
            text = f"{picture.name}: all its objects are left out, and so is the image: it is no background"
            findings.add("image without a usable object", picture.annotated.source, picture.name, text)
            continue
        images.append({"id": len(images) + 1, "file_name": picture.name, "width": width, "height": height})
        annotations += [{"id": 0, "image_id": len(images), **row} for row in rows]
    for name, (height, width) in background:
        images.append({"id": len(images) + 1, "file_name": name, "width": width, "height": height})
    for place, row in enumerate(annotations, 1):
        row["id"] = place
    categories = [{"id": id, "name": classes[id]} for id in sorted(classes)]
    info = {"description": description}
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}, counts


def coco_bytes(content: Mapping[str, Any]) -> bytes:
    """A line for each image and annotation."""
    parts = []
    for key, value in content.items():
        rows = [json.dumps(row) for row in value] if isinstance(value, list) else None
        text = json.dumps(value) if rows is None else "\n".join(["[", ",\n".join(rows), "]"])
        parts.append(f"{json.dumps(key)}: {text}")
    return ("{" + ",\n".join(parts) + "}\n").encode()


def label_list(
    pictures: Sequence[Picture], classes: Mapping[int, str] | None, findings: DataProblems, *, images: Path, out: Path
) -> tuple[bytes, Counter[str]]:
    """A csv of file names relative to the folder of `out`, and the number of images of each label.

    Its columns are filename and label; `labels`, separated by |, where an image has several.

    Raises:
        ValueError: a label holds the separator.
    """
    known = None if classes is None else set(classes.values())
    rows: list[tuple[str, list[str]]] = []
    counts: Counter[str] = Counter()
    for picture in pictures:
        labels = list(dict.fromkeys(picture.annotated.labels))
        for label in [label for label in labels if known is not None and label not in known]:
            text = f"{label} of {picture.name} is not one of the classes"
            findings.add("unknown class", picture.annotated.source, picture.name, text, lost=1)
            labels.remove(label)
        if labels:
            rows.append((os.path.relpath(images / picture.name, out.parent), labels))
            counts.update(labels)
    several = any(len(labels) > 1 for _, labels in rows)
    bad = next((label for label in counts if several and SEPARATOR in label), None)
    if bad is not None:
        raise ValueError(f"the label {bad!r} holds {SEPARATOR}, which separates labels; rename it")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["filename", "labels" if several else "label"])
    writer.writerows([name, SEPARATOR.join(labels)] for name, labels in rows)
    return text.getvalue().encode("utf-8", "surrogateescape"), counts


def _row(shape: Shape, category: int) -> dict[str, Any]:
    """As COCO writes it, unchecked."""
    row: dict[str, Any] = {"category_id": category, "iscrowd": int(shape.ignored)}
    if shape.mask is not None:
        return {**row, "segmentation": shape.mask}
    if shape.polygons:
        xs = [value for part in shape.polygons for value in part[::2]]
        ys = [value for part in shape.polygons for value in part[1::2]]
        x1, y1, x2, y2 = min(xs), min(ys), max(xs), max(ys)
        row["segmentation"] = [[round(value, 3) for value in part] for part in shape.polygons]
    else:
        assert shape.box is not None
        x1, y1, x2, y2 = shape.box
    return {**row, "bbox": [x1, y1, x2 - x1, y2 - y1]}


def _checked(row: dict[str, Any], found: CocoObject, *, masks: bool) -> dict[str, Any]:
    """The row with the box, area and kind that the reader found."""
    x1, y1, x2, y2 = found.box.tolist()
    row = {**row, "bbox": [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)], "area": round(found.area, 2)}
    if not found.used:
        row["iscrowd"] = 1
        if masks:
            row["segmentation"] = [[x1, y1, x2, y1, x2, y2, x1, y2]]
    return row
