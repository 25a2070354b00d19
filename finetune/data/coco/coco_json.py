"""A COCO annotation file, checked: every entry that cannot be used in training is reported and left out.

Lin et al. 2014, "Microsoft COCO"; https://cocodataset.org/#format-data. Category ids may be any integers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.coco.ids import image_id, integer
from finetune.data.coco.instances import Instances
from finetune.data.coco.objects import CocoEntry, ObjectReader
from finetune.data.convert.formats import pointer
from finetune.data.examples import DataProblems
from finetune.predictions import Classes
from pretrain.core.files import read_bytes
from pretrain.core.text import shown

_KEYS = {"images": list, "annotations": list, "categories": list}


@dataclass(frozen=True)
class CocoFile:
    """The content of a file after the checks: classes in the order of their category ids (label i + 1 is classes[i]),
    and `instances` by image id, of images that have any.

    spoiled: ids of images that have annotations, none of which can be used: they are no background.
    """

    path: Path
    classes: Classes
    entries: list[CocoEntry]
    instances: dict[int | str, Instances]
    spoiled: frozenset[int | str]


def read_coco(path: Path, *, masks: bool, findings: DataProblems, like: Classes | None = None) -> CocoFile:
    """Read and check `path`.

    Args:
        masks: keep masks, and leave out objects without one.
        findings: gets the problem of each wrong entry, and the number of annotations. Objects that are left out become
            ignored regions (crowds), where they have a place.
        like: classes of the training set, which give the labels.

    Raises:
        ValueError: it is no COCO file, has no category, repeats ids, or has categories that are not among `like`.
    """
    data = load(path)
    classes = read_classes(path, data["categories"])
    if like is not None:
        classes = _same_classes(path, classes, like)
    entries = _entries(path, data["images"], findings)
    rows = _by_image(path, data["annotations"], {entry.id for entry in entries}, findings)
    labels = {category: label for label, category in enumerate(classes.category_ids, start=1)}
    reader = ObjectReader(path, labels, masks=masks, findings=findings)
    instances: dict[int | str, Instances] = {}
    spoiled: set[int | str] = set()
    for entry in entries:
        of_image = rows.get(entry.id, ())
        objects = [found for number, row in of_image if (found := reader.read(row, number, entry)) is not None]
        if any(found.used for found in objects):
            instances[entry.id] = reader.stack(objects)
        elif of_image:
            spoiled.add(entry.id)
    return CocoFile(path, classes, entries, instances, frozenset(spoiled))


def load(path: Path) -> dict[str, Any]:
    """A COCO file as it is, of instances or panoptic.

    Raises:
        ValueError: it cannot be read, is not JSON, or lacks one of the lists.
    """
    try:
        data = json.loads(read_bytes(path))
    except OSError as error:
        raise ValueError(f"{path}: cannot read the annotations: {error.strerror}{pointer(path)}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8; nested without end
        raise ValueError(f"{path}: not JSON: {error}{pointer(path)}") from error
    if not isinstance(data, dict):
        have = f"got a {type(data).__name__}{pointer(path)}"
        raise ValueError(f"{path}: expected COCO's {{images, annotations, categories}}, {have}")
    for key, kind in _KEYS.items():
        if not isinstance(data.get(key), kind):
            have = shown(", ".join(list(data)[:10]))
            raise ValueError(
                f"{path}: no list named {key!r}; a COCO file has one (this one has: {have}){pointer(path)}"
            )
    return data


def read_classes(path: Path, rows: Sequence[Any]) -> Classes:
    """The categories in the order of their ids; ValueError without ids and names, and for an id that is used twice."""
    try:
        pairs = sorted((_category_id(row["id"]), str(row["name"])) for row in rows)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: a category needs an integer id and a name: {error!r}") from error
    if not pairs:
        raise ValueError(f"{path}: categories is empty; a detector needs at least one")
    twice = _first_twice([category for category, _ in pairs])
    if twice is not None:
        raise ValueError(f"{path}: category id {twice} is given more than once")
    return Classes([name for _, name in pairs], [category for category, _ in pairs])


def _category_id(value: Any) -> int:
    number = integer(value)
    if number is None:
        raise ValueError(f"id {value!r}")
    return number


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
            number = image_id(row["id"])
            entry = CocoEntry(number or 0, str(row["file_name"]), int(row["height"]), int(row["width"]))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            findings.add("bad image entry", str(path), place, f"images[{place}] has no usable {error}")
            continue
        if number is None or entry.height < 1 or entry.width < 1:
            findings.add("bad image entry", str(path), place, f"images[{place}]: id {row['id']!r}, {entry}")
            continue
        entries.append(entry)
    twice = _first_twice([entry.id for entry in entries])
    if twice is not None:
        raise ValueError(f"{path}: image id {twice} is given more than once; annotations cannot be assigned to images")
    return entries


def _by_image(
    path: Path, rows: Sequence[Any], known: set[int | str], findings: DataProblems
) -> dict[int | str, list[tuple[int, dict[str, Any]]]]:
    """Annotations by image, in the order of the file, with their ids; numbers instead if they are no ids."""
    findings.labels += len(rows)
    found: list[tuple[int, int | None, int | str, dict[str, Any]]] = []
    numbers = Counter(integer(row.get("id")) for row in rows if isinstance(row, dict))
    seen: set[str] = set()
    for place, row in enumerate(rows):
        if not isinstance(row, dict):
            findings.add("bad annotation", str(path), place, f"annotations[{place}] is no object of JSON", lost=1)
            continue
        number, image = integer(row.get("id")), image_id(row.get("image_id"))
        whole = repr(row) if numbers[number] > 1 else ""
        name = place if number is None else number
        if image is None or image not in known:
            text = f"image_id {row.get('image_id')!r} is not among the images"
            findings.add("unknown image", str(path), name, text, lost=1)
        elif whole and whole in seen:
            findings.add("repeated annotation", str(path), name, f"annotations[{place}] is an earlier one again")
        else:
            seen.add(whole)
            found.append((place, number, image, row))
    shared = Counter(number for _, number, _, _ in found)
    wrong = [(place, row) for place, number, _, row in found if number is None or shared[number] > 1]
    if wrong:
        place, row = wrong[0]
        text = (
            f"{len(wrong)} of {len(rows)} annotations have no id of their own, the first is annotations[{place}] with "
        )
        text += f"id {row.get('id')!r}; no id is used in training"
        findings.add("annotations without own ids", str(path), place, f"{text}: all are numbered in their order")
    by_image: dict[int | str, list[tuple[int, dict[str, Any]]]] = {}
    for place, number, image, row in found:
        by_image.setdefault(image, []).append((place if wrong or number is None else number, row))
    return by_image


def _first_twice(values: Sequence[Any]) -> Any:
    return next((value for value, count in Counter(values).items() if count > 1), None)
