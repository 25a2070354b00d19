"""CVAT for images 1.1: an .xml for all images. https://docs.cvat.ai/docs/other/xml_format"""

from __future__ import annotations

from xml.etree.ElementTree import Element

import numpy as np

from finetune.data.convert.annotated import (
    Annotated,
    Annotations,
    Shape,
    Unusable,
    add_objects,
    ellipse,
    name_of,
    number,
    placed,
    polygon,
    rectangle,
    sides,
)
from finetune.data.convert.files import Source, read_xml
from finetune.data.examples import DataProblems
from pretrain.core.images import MAX_PIXELS

_NO_OBJECTS = {"tag", "attribute"}


def read(source: Source, findings: DataProblems) -> Annotations:
    """Boxes, polygons, ellipses and masks; tags label the image.

    Raises:
        ValueError: it is an export for video, or none of CVAT.
    """
    images, classes = [], dict[str, None]()
    for path in source.of(".xml"):
        root = read_xml(path)
        if root.tag != "annotations" or root.find("image") is None:
            video = " for video" if root.find("track") is not None else ""
            raise ValueError(f"{path}: an export{video} without <image>; export the task as 'CVAT for images 1.1'")
        classes |= dict.fromkeys(
            name.text.strip() for name in root.findall("./meta//labels/label/name") if name.text and name.text.strip()
        )
        for found in root.findall("image"):
            name = found.get("name") or ""
            image = Annotated(source.name(path), (name,), split=(found.get("subset") or "").lower())
            image.size = sides(found.get("height"), found.get("width"))
            objects = [(f"{name} {row.tag} {n}", row) for n, row in enumerate(found) if row.tag not in _NO_OBJECTS]
            add_objects(image, objects, lambda row, size=image.size: _object(row, size))
            image.labels = [label.strip() for row in found.findall("tag") if (label := row.get("label"))]
            images.append(image)
    return Annotations(images, dict(enumerate(classes, 1)) or None)


def _object(row: Element, size: tuple[int, int] | None) -> Shape:
    label = name_of(row.get("label"))
    if row.tag == "box":
        x1, y1, x2, y2 = (number(row.get(key)) for key in ("xtl", "ytl", "xbr", "ybr"))
        return rectangle(label, x1, y1, x2, y2, number(row.get("rotation", 0)), ((x1 + x2) / 2, (y1 + y2) / 2))
    if row.tag == "polygon":
        points = [point.split(",") for point in (row.get("points") or "").split(";") if point]
        if any(len(point) != 2 for point in points):
            raise Unusable("bad polygon", "its points are not x,y;x,y;...")
        return polygon(label, [(number(x), number(y)) for x, y in points])
    if row.tag == "ellipse":
        x, y, radius_x, radius_y = (number(row.get(key)) for key in ("cx", "cy", "rx", "ry"))
        return ellipse(label, x, y, radius_x, radius_y, number(row.get("rotation", 0)))
    if row.tag == "mask":
        left, top, width, height = (int(number(row.get(key))) for key in ("left", "top", "width", "height"))
        return placed(label, _mask(row.get("rle") or "", width, height), left, top, size)
    raise Unusable("unsupported shape", f"a {row.tag[:40]}")


def _mask(text: str, width: int, height: int) -> np.ndarray:
    """Runs of 0 and 1 in turn, along the rows of its box."""
    try:
        runs = np.array([int(run) for run in text.split(",")], dtype=np.int64)
    except (ValueError, OverflowError):
        raise Unusable("bad mask", f"its rle is {text[:40]!r}") from None
    fits = min(width, height) > 0 and width * height <= MAX_PIXELS and runs.min() >= 0 and runs.max() <= MAX_PIXELS
    if not fits or runs.sum() != width * height:
        raise Unusable("bad mask", f"its runs do not sum to its box of {width} x {height} pixels")
    return np.repeat(np.arange(len(runs)) % 2, runs).reshape(height, width)
