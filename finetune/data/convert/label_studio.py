"""Label Studio: its JSON export, a list of tasks. https://labelstud.io/guide/task_format"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

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
    rectangle,
    sides,
)
from finetune.data.convert.files import Source, read_json
from finetune.data.examples import DataProblems
from pretrain.core.images import MAX_PIXELS
from pretrain.data.shards.image_files import SUFFIXES

_PREFIX = re.compile(r"^[0-9a-f]{8}-")  # of uploaded files
_OF_IMAGE = ("choices", "taxonomy")
_NOT_SHAPES = ("textarea", "rating", "relation", "number", "datetime", "pairwise", "ranker")


def fits(data: Any) -> bool:
    """Whether a JSON is a list of tasks."""
    first = data[0] if isinstance(data, list) and data else None
    return isinstance(first, dict) and isinstance(first.get("data"), dict)


def read(source: Source, findings: DataProblems) -> Annotations:
    """Rectangles, polygons, ellipses and brushes; choices label the image. Of several annotators the first is used.

    Raises:
        ValueError: it is another export (JSON-MIN).
    """
    images, several, without = [], 0, 0
    for path in source.of(".json"):
        data = read_json(path)
        if not fits(data):
            raise ValueError(f"{path}: no list of tasks with data; export the project as JSON (not JSON-MIN)")
        for number_, task in enumerate(data):
            results = list(_finished(task))
            if not results:
                without += 1
                continue
            several += len(results) > 1
            rows = [row for row in results[0] if isinstance(row, dict)]
            image = Annotated(source.name(path), _names(task, number_))
            size = image.size = next(
                (found for row in rows if (found := sides(row.get("original_height"), row.get("original_width")))), None
            )
            shapes = [(f"task {task.get('id', number_)} {row.get('id', '')}", row) for row in rows if _is_shape(row)]
            add_objects(image, shapes, lambda row, size=size: _object(row, size))
            image.labels = [label for row in rows if row.get("type") in _OF_IMAGE for label in _choices(row)]
            images.append(image)
    notes = []
    if several:
        notes.append(f"{several} images have several annotations: the first that was submitted is used")
    if without:
        notes.append(f"{without} tasks without a submitted annotation are left out")
    return Annotations(images, notes=notes)


def _finished(task: Any) -> Iterator[list[Any]]:
    """The results of the annotations that were not cancelled."""
    found = task.get("annotations", task.get("completions")) if isinstance(task, dict) else None
    for annotation in found if isinstance(found, list) else ():
        if isinstance(annotation, dict) and not annotation.get("was_cancelled"):
            result = annotation.get("result")
            yield result if isinstance(result, list) else []


def _names(task: Mapping[str, Any], place: int) -> tuple[str, ...]:
    """The image of a task: a URL, an upload (8 hex digits in front) or a local file (/data/local-files/?d=a/b.jpg)."""
    data = task.get("data")
    texts = [value for value in data.values() if isinstance(value, str)] if isinstance(data, dict) else []
    names = []
    for text in texts:
        parts = urlsplit(text) if "://" in text or text.startswith("/") else None
        name = text if parts is None else parse_qs(parts.query).get("d", [unquote(parts.path)])[0]
        if PurePosixPath(name).suffix.lower() in SUFFIXES:
            names.append(name)
    if not names:
        return (f"task {task.get('id', place)}",)
    last = names[0].rpartition("/")[2]
    return names[0], last, _PREFIX.sub("", last)  # the folders of an upload are the server's


def _is_shape(row: Mapping[str, Any]) -> bool:
    kind = row.get("type")
    return kind not in _OF_IMAGE and kind not in _NOT_SHAPES


def _choices(row: Mapping[str, Any]) -> list[str]:
    value = row.get("value")
    chosen = value.get(row["type"]) if isinstance(value, dict) else None
    flat = [path[-1] if isinstance(path, list) and path else path for path in chosen or ()]
    return [label.strip() for label in flat if isinstance(label, str) and label.strip()]


def _object(row: Mapping[str, Any], size: tuple[int, int] | None) -> Shape:
    kind, value = str(row.get("type")), row.get("value")
    if not isinstance(value, dict):
        raise Unusable("bad shape", f"a {kind[:40]} without value")
    labels = value.get(kind) or value.get("labels")
    if kind in ("rectangle", "polygon", "ellipse", "brush") and not labels:
        raise Unusable("object without a class", f"a {kind} without labels")
    if isinstance(labels, list) and len(labels) > 1:
        raise Unusable("several classes", f"its labels are {', '.join(map(str, labels))[:60]}")
    label = name_of(labels[0] if isinstance(labels, list) and labels else None)
    if row.get("image_rotation"):
        raise Unusable("rotated image", f"annotated on an image turned by {row['image_rotation']!s:.10} degrees")
    if kind.startswith("brush") and value.get("format") == "rle":
        return placed(label, _brush(value.get("rle"), size), 0, 0, size)
    across, down = (1.0, 1.0) if size is None else (float(size[1]), float(size[0]))  # percent to fractions or pixels
    degrees, unit = number(value.get("rotation", 0)), {"fractions": size is None}
    if degrees and size is None:
        raise Unusable("unsupported shape", "a rotated shape in an image without original_width and original_height")
    if kind.startswith("rectangle"):
        x, width = (number(value.get(key)) * across / 100 for key in ("x", "width"))
        y, height = (number(value.get(key)) * down / 100 for key in ("y", "height"))
        if size is None:
            return box(label, x, y, x + width, y + height, **unit)
        return rectangle(label, x, y, x + width, y + height, degrees, (x, y))  # about its first corner
    if kind.startswith("polygon"):
        points = value.get("points")
        if not isinstance(points, list) or any(not isinstance(p, list) or len(p) != 2 for p in points):
            raise Unusable("bad polygon", "its points are not a list of x, y")
        return polygon(label, [(number(x) * across / 100, number(y) * down / 100) for x, y in points], **unit)
    if kind.startswith("ellipse"):
        x, radius_x = (number(value.get(key)) * across / 100 for key in ("x", "radiusX"))
        y, radius_y = (number(value.get(key)) * down / 100 for key in ("y", "radiusY"))
        return ellipse(label, x, y, radius_x, radius_y, degrees, **unit)
    raise Unusable("unsupported shape", f"a {kind[:40]}")


def _brush(given: Any, size: tuple[int, int] | None) -> np.ndarray:
    """The mask [H, W] of a brush: RGBA bytes, packed by thi.ng/rle-pack, whose alpha is not 0 inside.

    A stream of bits. Header: number of values (32 bits), width of a value minus 1 (5 bits), four widths of a count,
    each minus 1 (4 bits). Then blocks: kind (1 bit: 1 is a run of one value, 0 a list of values), which of the four
    widths (2 bits), count minus 1, then the value of the run or the values of the list.
    """
    if size is None or not isinstance(given, list) or not all(type(v) is int and 0 <= v < 256 for v in given):
        raise Unusable("bad mask", "its rle is not a list of bytes, or original_width is missing")
    bits, place = "".join(f"{byte:08b}" for byte in given), 0

    def take(count: int) -> int:
        nonlocal place
        if place + count > len(bits):
            raise Unusable("bad mask", "its rle ends too early")
        place += count
        return int(bits[place - count : place], 2)

    count, width = take(32), take(5) + 1
    lengths = [take(4) + 1 for _ in range(4)]
    if count != 4 * size[0] * size[1] or size[0] * size[1] > MAX_PIXELS or width != 8:
        raise Unusable(
            "bad mask", f"its rle has {count} values of {width} bits, the image {size[1]} x {size[0]} pixels"
        )
    values, done = np.zeros(count, dtype=np.uint8), 0
    while done < count:
        repeated = take(1)
        end = min(done + take(lengths[take(2)]) + 1, count)
        if repeated:
            values[done:end] = take(width)
        else:
            values[done:end] = [take(width) for _ in range(end - done)]
        done = end
    return values.reshape(*size, 4)[:, :, 3]
