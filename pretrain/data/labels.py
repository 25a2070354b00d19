"""Labels of images: numbers or names in a list, the file of class names, and folders that are no classes."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.core.files import read_text
from pretrain.core.text import shown
from pretrain.data.image_list import ListedImage

CLASSES_FILE = "classes.json"
SPLITS = ("train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing")
_NUMBER = re.compile(r"-?\d+(\.0+)?")  # spreadsheets write 1 as 1.0 if a row has no number


def splits_among(classes: Iterable[str]) -> list[str]:
    """The names that are parts of a data set (train, val, ...) and no classes, in this order; none if they may be
    classes."""
    names = list(classes)
    splits = sorted((name for name in names if name.lower() in SPLITS), key=lambda name: SPLITS.index(name.lower()))
    return splits if len(splits) >= 2 or len(splits) == len(names) else []


def refuse_splits(shards: Sequence[str]) -> None:
    """ValueError if the class names next to `shards` are parts of a data set: their labels are no classes."""
    path = Path(shards[0]).with_name(CLASSES_FILE)
    if path.is_file() and (splits := splits_among(read_classes(path).values())):
        raise ValueError(
            f"{path}: its classes {', '.join(splits)} are parts of a data set, not classes; write the images of one of "
            "them (fovea data write)"
        )


def number_labels(
    where: Path | str, rows: Sequence[ListedImage], given: Mapping[int, str] | None = None
) -> tuple[list[int | None], dict[int, str]]:
    """The class number of each row, and the classes by number.

    Labels that are all plain numbers are the numbers of classes; else all are names, numbered in sorted order, or by
    `given`, where they may also be numbers of its classes if no class has a number for its name. None: no label, or
    one that is not among `given`. 007, -1 and other numbers that no class can have are names.

    Raises:
        ValueError: some labels are numbers and some are names, one number has two class names, or is too large.
    """
    named = _names_of_numbers(where, rows)
    texts = [label if (label := _plain(row.label)).isdecimal() else row.class_name or label for row in rows]
    if given is not None:
        for number, name in named.items():
            if given.get(number, name) != name:
                raise ValueError(f"{where}: label {number} is {name!r}, in the given classes {given[number]!r}")
        numbers = {name: number for number, name in given.items()}
        if not any(_NUMBER.fullmatch(name) for name in given.values()):  # else 7 could be a name or a number
            numbers |= {str(number): number for number in given}
        return [numbers.get(text) for text in texts], dict(given)
    distinct = {text for text in texts if text}
    numeric = {text for text in distinct if _NUMBER.fullmatch(text)}
    if numeric and numeric != distinct:
        raise ValueError(
            f"{where}: some labels are integers ({min(numeric)}) and some are names "
            f"({shown(min(distinct - numeric))}); correct them, or give a {CLASSES_FILE} that names them all"
        )
    if too_large := next((text for text in sorted(numeric) if len(text) > 18), None):
        raise ValueError(
            f"{where}: label {shown(too_large[:40])} is no number of a class (18 digits at most); correct it, or give "
            "all classes names"
        )
    if numeric and all(text == str(int(text)) and int(text) >= 0 for text in numeric):
        return [int(text) if text else None for text in texts], named
    classes = dict(enumerate(sorted(distinct)))
    numbers = {name: number for number, name in classes.items()}
    return [numbers.get(text) for text in texts], classes


def read_classes(path: Path) -> dict[int, str]:
    """Names of classes by number: a list of names, {"0": name, ...}, or {"classes": [{"id": 0, "name": name}, ...]}.

    Raises:
        ValueError: it is none of these, or two classes have one name or one number.
    """
    try:
        found = json.loads(read_text(path, encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid json: {error}") from error
    pairs = _pairs(found)
    if not pairs:
        forms = '{"0": name} or {"classes": [{"id": 0, "name": name}]}'
        raise ValueError(f"{path}: no classes; expected a list of names, {forms}")
    pairs.sort()
    for which, values in (("number", [str(number) for number, _ in pairs]), ("name", [name for _, name in pairs])):
        twice = [value for value, count in Counter(values).items() if count > 1]
        if twice:
            raise ValueError(f"{path}: the {which} {shown(', '.join(twice[:5]))} is used by two classes")
    return dict(pairs)


def classes_json(classes: Mapping[int, str]) -> bytes:
    """What `read_classes` reads."""
    entries = ",\n".join(f" {json.dumps({'id': i, 'name': classes[i]})}" for i in sorted(classes))
    return f'{{"classes": [\n{entries}\n]}}\n'.encode()


def _pairs(found: Any) -> list[tuple[int, str]]:
    if isinstance(found, dict) and "classes" in found:
        found = found["classes"]
    if isinstance(found, dict) and all(re.fullmatch(r"-?\d+", key) for key in found):
        return [(int(key), str(name)) for key, name in found.items()]
    if not isinstance(found, list):
        return []
    if all(isinstance(item, str) for item in found):
        return list(enumerate(found))
    if all(isinstance(item, dict) and type(item.get("id")) is int and "name" in item for item in found):
        return [(item["id"], str(item["name"])) for item in found]
    return []


def _names_of_numbers(where: Path | str, rows: Sequence[ListedImage]) -> dict[int, str]:
    """Class names of rows that have a number and a name."""
    named: dict[int, str] = {}
    for row in rows:
        label = _plain(row.label)
        if label.isdecimal() and row.class_name and named.setdefault(int(label), row.class_name) != row.class_name:
            other = f"{named[int(label)]!r} and {row.class_name!r}"
            raise ValueError(f"{where}, line {row.line}: label {int(label)} is {other}")
    return named


def _plain(label: str) -> str:
    """1 of 1.0."""
    return label.partition(".")[0] if _NUMBER.fullmatch(label) else label
