"""labelme (and AnyLabeling): a .json per image. https://github.com/wkentaro/labelme"""

from __future__ import annotations

import base64
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from finetune.data.convert.annotated import (
    Annotated,
    Annotations,
    Shape,
    Unusable,
    add_objects,
    box,
    ellipse,
    name_of,
    number,
    placed,
    polygon,
    sides,
)
from finetune.data.convert.files import Source, read_json, readable
from finetune.data.examples import DataProblems
from pretrain.data.write.images import UnreadableImageError, open_image


def fits(data: Any) -> bool:
    """Whether a JSON is a labelme file."""
    return isinstance(data, dict) and isinstance(data.get("shapes"), list) and "imagePath" in data


def _data(path: Path) -> dict[str, Any]:
    data = read_json(path)
    if not fits(data):
        raise ValueError(f"{path}: no labelme file; expected shapes and imagePath")
    return data


def read(source: Source, findings: DataProblems) -> Annotations:
    """Polygons, rectangles, circles, masks; polygons of one class and group are one object. Flags label the image."""
    images = []
    for name, data in readable(source, source.of(".json"), _data, findings):
        folder = PurePosixPath(name).parent
        stem = str(PurePosixPath(name).with_suffix(".jpg"))
        image = Annotated(name, (str(folder / str(data["imagePath"]).replace("\\", "/")), stem))
        image.size = sides(data.get("imageHeight"), data.get("imageWidth"))
        grouped: dict[Any, list[Any]] = defaultdict(list)
        for place, shape in enumerate(data["shapes"]):
            group = shape.get("group_id") if isinstance(shape, dict) else None
            parts = group is not None and shape.get("shape_type") in ("polygon", None)
            grouped[(str(shape.get("label")), str(group)) if parts else place].append((place, shape))
        objects = ((f"shape {parts[0][0]}", [shape for _, shape in parts]) for parts in grouped.values())
        add_objects(image, objects, lambda parts, size=image.size: _object(parts, size))
        flags = data.get("flags")
        image.labels = [str(flag) for flag, on in flags.items() if on is True] if isinstance(flags, dict) else []
        images.append(image)
    return Annotations(images)


def _object(parts: list[Any], size: tuple[int, int] | None) -> Shape:
    shapes = [_shape(part, size) for part in parts]
    return replace(shapes[0], polygons=sum((shape.polygons for shape in shapes), ()))


def _shape(found: Any, size: tuple[int, int] | None) -> Shape:
    if not isinstance(found, Mapping) or not isinstance(found.get("points"), list):
        raise Unusable("bad shape", f"{str(found)[:60]} has no points")
    label, kind = name_of(found.get("label")), found.get("shape_type") or "polygon"
    points = [_point(point) for point in found["points"]]
    if kind == "polygon" or (kind == "rotation" and len(points) == 4):
        return polygon(label, points)
    if kind == "rectangle" and len(points) in (2, 4):  # AnyLabeling writes all corners
        xs, ys = zip(*points, strict=True)
        return box(label, min(xs), min(ys), max(xs), max(ys))
    if kind == "circle" and len(points) == 2:  # the centre, and a point on it
        radius = math.dist(*points)
        return ellipse(label, *points[0], radius, radius)
    if kind == "mask" and len(points) == 2:
        left, top = (int(value) for value in points[0])
        return placed(label, _mask(found.get("mask")), left, top, size)
    raise Unusable("unsupported shape", f"a {kind} of {len(points)} points")


def _point(value: Any) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise Unusable("bad shape", f"{str(value)[:40]} is no point")
    return number(value[0]), number(value[1])


def _mask(text: Any) -> np.ndarray:
    """The pixels of the box in a base64 PNG."""
    try:
        return np.asarray(open_image(base64.b64decode(text, validate=True)).convert("L"))
    except (TypeError, ValueError, UnreadableImageError, OSError, SyntaxError) as error:
        raise Unusable("bad mask", f"its mask is no base64 PNG: {str(error)[:80]}") from error
