"""YOLO: a .txt per image with a line `class x y width height`, or `class x1 y1 x2 y2 ...` of a polygon, in fractions.

Class names are in data.yaml (Ultralytics, Roboflow), classes.txt (labelImg, Label Studio) or obj.names (Darknet, CVAT).
https://docs.ultralytics.com/datasets/detect, https://docs.ultralytics.com/datasets/segment
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from finetune.data.convert.annotated import Annotated, Annotations, Shape, Unusable, add_objects, box, number, polygon
from finetune.data.convert.files import Source, read_text, readable
from finetune.data.examples import DataProblems

_LINE = re.compile(r"\s*\d+(\s+[-+0-9.eE]+){4,}\s*")
_NAMES = ("classes.txt", "obj.names", "_darknet.labels", "predefined_classes.txt")
_OVER = 0.01  # a fraction may lie outside 0 to 1 by this much before it cannot be one


def is_label_file(path: Path) -> bool:
    """Whether the first line of a .txt is an object."""
    try:
        return _LINE.fullmatch(read_text(path).strip().partition("\n")[0]) is not None
    except ValueError:
        return False


def is_data_file(path: Path) -> bool:
    """Whether a .yaml names classes, as data.yaml does."""
    data = _load(path)
    return isinstance(data, dict) and "names" in data and not {"task", "run_dir"} & data.keys()


def read(source: Source, findings: DataProblems) -> Annotations:
    """Read every label file; a label file without a line is an image without objects.

    Raises:
        ValueError: there are no class names.
    """
    given = _yaml(source)
    names = _class_names(source, given)
    lists = _splits(source, given)
    pose = "kpt_shape" in given
    folder = Source(source.folder)  # of data.yaml, where that is given
    notes = ["the points of poses are left out, their boxes are used"] if pose else []
    images, others = [], []
    listed = set(lists.values())
    paths = (
        path for path in folder.of(".txt") if path.name not in _NAMES and PurePosixPath(folder.name(path)) not in listed
    )
    for name, text in readable(folder, paths, read_text, findings):
        label = PurePosixPath(name)
        lines = [(n, line.split()) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        if lines and not _LINE.fullmatch(" ".join(lines[0][1])) and "labels" not in map(str.lower, label.parts):
            others.append(str(label))
            continue
        image = Annotated(str(label), (_image(label),), split=_split_of(label, lists))
        add_objects(image, ((f"line {n}", fields) for n, fields in lines), lambda f: _object(f, names, pose))
        images.append(image)
    if others:
        notes.append(f"{len(others)} .txt files do not begin with an object and are no labels: {', '.join(others[:3])}")
    return Annotations(images, names, notes)


def _object(fields: list[str], names: Mapping[int, str], pose: bool) -> Shape:
    if not fields[0].isdecimal() or int(fields[0]) not in names:
        raise Unusable("unknown class", f"class {fields[0][:20]} is not one of the {len(names)} names")
    label, values = names[int(fields[0])], [number(value) for value in fields[1:]]
    if len(values) == 5:
        raise Unusable("bad line", "6 numbers: class, box and a confidence, as of a prediction; remove the last one")
    if len(values) < 4 or (len(values) % 2 and not pose):
        raise Unusable("bad line", f"{len(fields)} numbers: neither a box nor a polygon")
    coordinates = values[:4] if pose else values
    if min(coordinates) < -_OVER or max(coordinates) > 1 + _OVER:
        raise Unusable("coordinates are no fractions", f"{max(coordinates, key=abs):g}: expected 0 to 1")
    if len(coordinates) > 4:
        return polygon(label, list(zip(values[::2], values[1::2], strict=True)), fractions=True)
    x, y, width, height = coordinates
    return box(label, x - width / 2, y - height / 2, x + width / 2, y + height / 2, fractions=True)


def _image(label: PurePosixPath) -> str:
    """The image of a label file: in `images` for the last `labels`; its suffix is any."""
    parts = list(label.parts)
    places = [place for place, part in enumerate(parts[:-1]) if part.lower() == "labels"]
    if places:
        parts[places[-1]] = "images"
    return str(PurePosixPath(*parts[:-1], f"{label.stem}.jpg"))


def _yaml(source: Source) -> dict[str, Any]:
    """data.yaml: the file given, or the only .yaml of the folder (or of that above) that has names."""
    if source.path.is_file():
        places = [source.path]
    else:
        places = [path for path in source.of(".yaml", ".yml")] or sorted(source.folder.parent.glob("*.yaml"))
    found = [_load(path) for path in places if is_data_file(path)]
    if len(found) > 1:
        raise ValueError(f"{source.path}: {len(found)} yaml files with names; give the one to use as SOURCE")
    return found[0] if found else {}


def _load(path: Path) -> Any:
    try:
        return yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: not YAML: {str(error)[:200]}") from error


def _class_names(source: Source, given: Mapping[str, Any]) -> dict[int, str]:
    names = given.get("names")
    if isinstance(names, list):
        return {place: str(name) for place, name in enumerate(names)}
    if isinstance(names, dict) and all(str(key).isdecimal() for key in names):
        return {int(key): str(name) for key, name in names.items()}
    for folder in (source.folder, source.folder.parent):
        for name in _NAMES:
            found = folder / name
            if not found.is_file():
                found = next((path for path in source.files if path.name == name), found)
            if found.is_file():
                return {place: line.strip() for place, line in enumerate(read_text(found).splitlines()) if line.strip()}
    raise ValueError(
        f"{source.path}: no class names; YOLO files hold numbers only. Put data.yaml, or classes.txt with a name per "
        "line, next to them"
    )


def _splits(source: Source, given: Mapping[str, Any]) -> dict[str, PurePosixPath]:
    """The folders or lists of images that data.yaml names, by split, without the folders above."""
    found = {}
    for split in ("train", "val", "test"):
        value = given.get(split)
        for text in [value] if isinstance(value, str) else []:
            parts = [part for part in text.replace("\\", "/").split("/") if part not in ("", ".", "..")]
            if parts:
                found[split] = PurePosixPath(*parts)
    return found


def _split_of(label: PurePosixPath, splits: Mapping[str, PurePosixPath]) -> str:
    folders = PurePosixPath(_image(label)).parent.parts
    for split, place in splits.items():
        for count in range(len(place.parts)):
            tail = place.parts[count:]
            if len(tail) > 0 and folders[: len(tail)] == tail and tail != ("images",):
                return split
    return ""
