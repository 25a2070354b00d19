"""The formats that `fovea data convert` reads, and how one is recognized by its content."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import Any

from finetune.data.convert import cvat, label_studio, labelme, via, voc, yolo
from finetune.data.convert.annotated import Annotations
from finetune.data.convert.files import Source, read_json, read_text, read_xml
from finetune.data.examples import DataProblems

FORMATS: dict[str, Callable[[Source, DataProblems], Annotations]] = {
    "yolo": yolo.read,
    "voc": voc.read,
    "labelme": labelme.read,
    "via": via.read,
    "cvat": cvat.read,
    "label-studio": label_studio.read,
}
_LOOKED_AT = 20  # files of a suffix


def recognize(source: Source) -> str:
    """The format of the annotation files.

    Raises:
        ValueError: none is recognized, or files of several formats are there.
    """
    found: Counter[str] = Counter()
    for suffix in (".xml", ".json", ".csv", ".txt", ".yaml", ".yml"):
        for path in islice(source.of(suffix), _LOOKED_AT):
            kind = format_of(path)
            if kind is not None:
                found[kind] += 1
    if not found and any(path.name in ("classes.txt", "obj.names") for path in source.files):
        found["yolo"] += 1
    if found.keys() == {"coco"}:
        raise ValueError(f"{source.path}: COCO already; give it as `annotations` of data.train or data.val")
    found.pop("coco", None)
    if len(found) != 1:
        what = "files of " + ", ".join(sorted(found)) if found else "no annotation file of a known format"
        raise ValueError(f"{source.path}: {what}; give --format, one of {', '.join(FORMATS)}")
    return next(iter(found))


def pointer(path: Path | str, out: str = "OUT.json") -> str:
    """The command that converts what is at `path`, to end a message; "" if it is no annotation of other tools."""
    try:
        form = recognize(Source(Path(path)))
    except (ValueError, OSError):
        return ""
    return f". It is of the format {form}; this makes a file that is read: fovea data convert {quote(str(path))} {out}"


def format_of(path: Path) -> str | None:
    """The format of one file, "coco" included; None if it is none or cannot be read."""
    try:
        return _BY_SUFFIX[path.suffix.lower()](path) if path.suffix.lower() in _BY_SUFFIX else None
    except ValueError:
        return None


def _of_xml(path: Path) -> str | None:
    return {"annotation": "voc", "annotations": "cvat"}.get(read_xml(path).tag)


def _of_json(path: Path) -> str | None:
    data = read_json(path)
    if isinstance(data, dict) and {"images", "annotations", "categories"} <= data.keys():
        return "coco"
    tables: dict[str, Callable[[Any], bool]] = {
        "labelme": labelme.fits,
        "via": via.fits,
        "label-studio": label_studio.fits,
    }
    return next((name for name, fits in tables.items() if fits(data)), None)


def _of_csv(path: Path) -> str | None:
    lines = (line for line in read_text(path).splitlines() if not line.startswith("#"))  # VIA 1 starts with a comment
    return "via" if next(lines, "").replace(" ", "") == via.HEADER else None


def _of_txt(path: Path) -> str | None:
    return "yolo" if yolo.is_label_file(path) else None


def _of_yaml(path: Path) -> str | None:
    return "yolo" if yolo.is_data_file(path) else None


_BY_SUFFIX: dict[str, Callable[[Path], str | None]] = {
    ".xml": _of_xml,
    ".json": _of_json,
    ".csv": _of_csv,
    ".txt": _of_txt,
    ".yaml": _of_yaml,
    ".yml": _of_yaml,
}
