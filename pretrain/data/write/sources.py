"""The input of `fovea data write`: image files, their keys and their labels, from a folder or a CSV."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pretrain.data.shards.image_files import SUFFIXES, walk

_PATH_COLUMNS = ("filename", "path", "file", "file_name", "image", "image_path")


@dataclass(frozen=True)
class ImageSource:
    """One image file: `name` relative to the folder or as in the CSV; `size` in bytes, -1 if absent."""

    name: str
    key: str
    size: int
    label: int | None


@dataclass(frozen=True)
class Sources:
    """Files sorted by name, under `root`; classes: id -> name, empty without; ignored: other suffixes, counted."""

    root: Path
    files: list[ImageSource]
    classes: dict[int, str]
    ignored: Counter[str]


def find_sources(source: Path, *, labels: str, classes: Mapping[int, str] | None = None) -> Sources:
    """Read a folder (recursively) or a CSV.

    labels: "none", or "auto": the names of the top sub-folders if there are two or more and every image is in one, or
    a CSV's `label` or `class_name` column. Names get the ids of `classes` if given, else 0, 1, ... in sorted order;
    integer labels of a CSV are kept. ValueError: nothing found, a bad CSV, a class that is not in `classes`.
    """
    if source.is_dir():
        names, ignored = _images(source)
        raw: list[str | int | None] = [None] * len(names)
        tops = [name.split("/")[0] if "/" in name else None for name in names]
        if labels == "auto" and None not in tops and len(set(tops)) > 1:
            raw = list(tops)
        found_classes: dict[int, str] = {}
        root = source
    elif source.suffix.lower() == ".csv" and source.is_file():
        names, raw, found_classes = _read_csv(source, labels)
        root, ignored = source.parent, Counter()
    elif source.exists():
        raise ValueError(f"{source}: neither a folder of images nor a .csv that lists them")
    else:
        raise ValueError(f"{source}: no such folder or CSV")
    if not names:
        other = f"; it has other files: {_counted(ignored)}" if ignored else ""
        raise ValueError(f"{source}: no image found (looked for {', '.join(sorted(SUFFIXES))}){other}")
    ids, found_classes = _number(source, raw, found_classes, classes)
    labelled = sorted(zip(names, ids, strict=True))
    keys = _keys([name for name, _ in labelled])
    files = [
        ImageSource(name, key, _size(root / name), label) for (name, label), key in zip(labelled, keys, strict=True)
    ]
    return Sources(root, files, found_classes, ignored)


def read_classes(path: Path) -> dict[int, str]:
    """id -> name of a classes.json."""
    try:
        return {int(entry["id"]): str(entry["name"]) for entry in json.loads(path.read_bytes())["classes"]}
    except OSError as error:
        raise ValueError(f"{path}: cannot read the classes: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: expected {{"classes": [{{"id": 0, "name": "..."}}, ...]}}') from error


def classes_json(classes: Mapping[int, str]) -> bytes:
    """What `read_classes` reads."""
    entries = ",\n".join(f" {json.dumps({'id': i, 'name': classes[i]})}" for i in sorted(classes))
    return f'{{"classes": [\n{entries}\n]}}\n'.encode()


def _images(folder: Path) -> tuple[list[str], Counter[str]]:
    """Names of images below `folder`, links followed, without hidden ones; and the other suffixes, counted."""
    names: list[str] = []
    ignored: Counter[str] = Counter()
    for entry in walk(folder):
        path = Path(entry.path)
        if path.suffix.lower() not in SUFFIXES:
            ignored[path.suffix.lower() or "no suffix"] += 1
        elif entry.is_file() or entry.is_symlink():
            names.append(path.relative_to(folder).as_posix())
    return sorted(names), ignored


def _read_csv(path: Path, labels: str) -> tuple[list[str], list[str | int | None], dict[int, str]]:
    """File names, a label each (an id, a class name, or None), and id -> name where the CSV gives both."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            return _parse_csv(path, reader, labels)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 after line {reader.line_num}; save the list as UTF-8") from error
        except csv.Error as error:
            raise ValueError(f"{path}, after line {reader.line_num}: {error}; is a quote left open?") from error


def _parse_csv(
    path: Path, reader: csv.DictReader[str], labels: str
) -> tuple[list[str], list[str | int | None], dict[int, str]]:
    columns = {(name or "").strip().lower(): name for name in reader.fieldnames or ()}
    path_column = next((columns[name] for name in _PATH_COLUMNS if name in columns), None)
    if path_column is None:
        raise ValueError(f"{path}: no column named {' or '.join(_PATH_COLUMNS)}; it has: {', '.join(columns)}")
    label_column = columns.get("label") if labels == "auto" else None
    class_column = columns.get("class_name", columns.get("class")) if labels == "auto" else None
    names: list[str] = []
    raw: list[str | int | None] = []
    classes: dict[int, str] = {}
    for row in reader:
        name = (row[path_column] or "").strip()
        if not name:
            raise ValueError(f"{path}, line {reader.line_num}: no file name")
        names.append(name)
        label = (row[label_column] or "").strip() if label_column else None
        class_name = (row[class_column] or "").strip() if class_column else None
        if "" in (label, class_name):
            raise ValueError(f"{path}, line {reader.line_num}: {name} has no label; --labels none ignores them all")
        integer = re.fullmatch(r"(\d{1,9})(\.0+)?", label or "")  # spreadsheets write 1 as 1.0 if a row has no number
        number = int(integer[1]) if integer else None
        raw.append(number if number is not None else class_name or label)
        if number is not None and class_name and classes.setdefault(number, class_name) != class_name:
            raise ValueError(
                f"{path}, line {reader.line_num}: label {number} is {classes[number]!r} and {class_name!r}"
            )
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"{path}: {twice} is listed more than once")
    if len({type(label) for label in raw}) > 1:
        raise ValueError(f"{path}: some labels are integers and some are names")
    return names, raw, classes


def _number(
    source: Path, raw: list[str | int | None], classes: dict[int, str], given: Mapping[int, str] | None
) -> tuple[list[int | None], dict[int, str]]:
    """Ids of the labels, and id -> name."""
    names = sorted({label for label in raw if isinstance(label, str)})
    if not names:
        wrong = next((i for i, name in classes.items() if given and given.get(i) != name), None)
        if given and wrong is not None:
            raise ValueError(
                f"{source}: label {wrong} is {classes[wrong]!r}, in the given classes {given.get(wrong)!r}"
            )
        return [label if isinstance(label, int) else None for label in raw], dict(given or classes)
    if given is None:
        given = dict(enumerate(names))
    ids = {name: i for i, name in given.items()}
    unknown = [name for name in names if name not in ids]
    if unknown:
        raise ValueError(f"{source}: not in the given classes: {', '.join(unknown[:5])} ({len(unknown)} in all)")
    return [ids[label] if isinstance(label, str) else None for label in raw], dict(given)


def _keys(names: list[str]) -> list[str]:
    """A webdataset key for each name: its path without the suffix, dots and odd characters as `_`, made unique."""
    taken: set[str] = set()
    keys: list[str] = []
    for name in names:
        parts = [part for part in Path(name).with_suffix("").parts if part not in ("/", "..")]
        # a first part __like_this__ would be skipped by readers
        stem = re.sub(r"^_+", "_", re.sub(r"[^\w/-]+", "_", "/".join(parts)))
        key, count = stem, 1
        while key in taken:
            count += 1
            key = f"{stem}~{count}"
        taken.add(key)
        keys.append(key)
    return keys


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _counted(ignored: Counter[str]) -> str:
    return ", ".join(f"{suffix} {count}" for suffix, count in ignored.most_common(5))
