"""VGG Image Annotator (VIA) 1 and 2: a project, or an export as json or csv.

https://www.robots.ox.ac.uk/~vgg/software/via
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

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
    polygon,
)
from finetune.data.convert.files import Source, read_json, read_text
from finetune.data.examples import DataProblems

HEADER = "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes"
_CLASS = ("class", "label", "category", "type", "name", "class_name", "object")  # names that the attribute usually has
_Entry = tuple[str, list[Any], Any]  # file name, regions, file attributes


def fits(data: Any) -> bool:
    """Whether a JSON is a project or an export of VIA."""
    if not isinstance(data, dict):
        return False
    if "_via_img_metadata" in data:
        return True
    first = next(iter(data.values()), None)
    return isinstance(first, dict) and "filename" in first and "regions" in first


def read(source: Source, findings: DataProblems) -> Annotations:
    """Rectangles, polygons, circles and ellipses; the class is a region attribute.

    Raises:
        ValueError: it is no file of VIA, or several attributes could be the class.
    """
    entries = [entry for path in source.of(".json", ".csv") for entry in _entries(path)]
    attribute = _attribute(source, entries)
    images = []
    for name, regions, attributes in entries:
        image = Annotated(source.path.name, (name,))
        objects = ((f"{name} region {place}", region) for place, region in enumerate(regions))
        add_objects(image, objects, lambda region: _region(region, attribute))
        image.labels = _chosen(attributes.get(attribute)) if isinstance(attributes, dict) else []
        images.append(image)
    return Annotations(images, notes=[f"the attribute {attribute!r} is the class"])


def _entries(path: Any) -> Iterator[_Entry]:
    if path.suffix.lower() == ".csv":
        yield from _of_csv(path, read_text(path))
        return
    data = read_json(path)
    if not fits(data):
        raise ValueError(f"{path}: no file of VIA 1 or 2")
    entries = data.get("_via_img_metadata", data)
    for entry in entries.values() if isinstance(entries, dict) else ():
        if isinstance(entry, dict) and isinstance(entry.get("filename"), str):
            regions = entry.get("regions")
            regions = list(regions.values()) if isinstance(regions, dict) else regions  # VIA 1 numbers them
            yield entry["filename"], regions if isinstance(regions, list) else [], entry.get("file_attributes")


def _of_csv(path: Any, text: str) -> Iterator[_Entry]:
    lines = "".join(line for line in io.StringIO(text, newline="") if not line.startswith("#"))
    found: dict[str, tuple[list[Any], Any]] = {}
    try:
        for row in csv.DictReader(io.StringIO(lines, newline=""), strict=True):
            regions, _ = found.setdefault(row["filename"], ([], _json(row["file_attributes"])))
            shape = _json(row["region_shape_attributes"])
            if shape:
                regions.append({"shape_attributes": shape, "region_attributes": _json(row["region_attributes"])})
    except (csv.Error, KeyError) as error:
        raise ValueError(f"{path}: no csv of VIA 2 ({error!r}); its first line is {HEADER}") from error
    yield from ((name, regions, attributes) for name, (regions, attributes) in found.items())


def _json(text: str | None) -> Any:
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {"damaged": text}


def _attribute(source: Source, entries: list[_Entry]) -> str:
    """The attribute that holds the class."""
    if source.attribute is not None:
        return source.attribute
    met: Counter[str] = Counter()
    for _, regions, attributes in entries:
        for holder in regions or [{"region_attributes": attributes}]:
            of = holder.get("region_attributes") if isinstance(holder, dict) else None
            met.update(str(key) for key in of if _chosen(of[key])) if isinstance(of, dict) else None
    known = [name for name in met if name.lower() in _CLASS] or list(met)
    if len(known) != 1:
        have = ", ".join(f"{name} ({count})" for name, count in met.most_common(10)) or "none"
        raise ValueError(f"{source.path}: which attribute is the class? It has: {have}; give --attribute NAME")
    return known[0]


def _chosen(value: Any) -> list[str]:
    """A text, or the options of a checkbox that are on."""
    if isinstance(value, dict):
        return [str(option) for option, on in value.items() if on]
    return [value.strip()] if isinstance(value, str) and value.strip() else []


def _region(found: Any, attribute: str) -> Shape:
    shape = found.get("shape_attributes") if isinstance(found, Mapping) else None
    attributes = found.get("region_attributes") if isinstance(found, Mapping) else None
    if not isinstance(shape, dict) or not isinstance(attributes, dict):
        raise Unusable("bad shape", f"{str(found)[:60]} is no region")
    chosen = _chosen(attributes.get(attribute))
    if len(chosen) > 1:
        raise Unusable("several classes", f"{attribute} is {', '.join(chosen)[:60]}")
    label, kind = name_of(chosen[0] if chosen else None), shape.get("name")
    if kind == "rect":
        x, y, width, height = (number(shape.get(key)) for key in ("x", "y", "width", "height"))
        return box(label, x, y, x + width, y + height)
    if kind == "polygon":
        xs, ys = shape.get("all_points_x"), shape.get("all_points_y")
        if not isinstance(xs, list) or not isinstance(ys, list) or len(xs) != len(ys):
            raise Unusable("bad polygon", "its x and y are not lists of one length")
        return polygon(label, [(number(x), number(y)) for x, y in zip(xs, ys, strict=True)])
    if kind == "circle":
        radius = number(shape.get("r"))
        return ellipse(label, number(shape.get("cx")), number(shape.get("cy")), radius, radius)
    if kind == "ellipse":
        x, y, radius_x, radius_y = (number(shape.get(key)) for key in ("cx", "cy", "rx", "ry"))
        return ellipse(label, x, y, radius_x, radius_y, math.degrees(number(shape.get("theta", 0))))
    raise Unusable("unsupported shape", f"a {str(kind)[:40]}")
