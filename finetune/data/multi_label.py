"""Images with any number of labels each, listed in a csv.

The labels of an image are in one column (`cat|dog`), in several rows of one file name, or in a column per label with 0
and 1. The csv is `images` itself, or `annotations` that name the images of a folder, tar or shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.class_names import of_numbers, read_classes
from finetune.data.classification import EMPTY, NO_LABEL, SEPARATOR, UNKNOWN, agreed_classes
from finetune.data.coco.image_names import find_names
from finetune.data.examples import DataProblems, Example
from finetune.data.files import Files
from finetune.data.reading import PHOTOS, ImageFiles, Reading
from finetune.predictions import Classes
from pretrain.core.text import shown
from pretrain.data.image_list import SUFFIXES, ImageList, read_list
from pretrain.data.names import find_files

_SEPARATORS = (SEPARATOR, ";", ",")
_ON, _OFF = frozenset({"1", "1.0", "true"}), frozenset({"0", "0.0", "false"})


def open_examples(
    section: Any, source: Any, *, classes: Classes | None = None, reading: Reading = PHOTOS
) -> MultiLabelled:
    """The labelled images of a `finetune.config.DataSource`.

    Args:
        classes: of the training set, which the labels of this set must belong to; None: read from the source.
        reading: of the images.

    Raises:
        ValueError: there is no csv, its labels are in none of the forms, or no image has a label.
    """
    path = Path(source.annotations or (source.images if isinstance(source.images, str) else ""))
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{source.images}: several labels of an image are read from a csv: give it as images, or as annotations of "
            "a folder, tar or shards"
        )
    given = read_classes(source.classes) if source.classes else None
    known = agreed_classes(given, classes, where=str(path))
    listed = read_list(path, others=True)
    findings = DataProblems()
    if source.annotations is None:
        names = find_files(path.parent, [row.file for row in listed.rows])
        files = Files.listed(path.parent, [name for name in names if name is not None])
    else:
        files = Files.open(source.images)
        wanted = dict.fromkeys(row.file for row in listed.rows)
        found, _ = find_names(path, {file: file for file in wanted}, files)
        names = [found.get(row.file) for row in listed.rows]
    of_rows = _in_column(listed, known) if listed.labelled else _in_columns(listed, known)
    labels = _of_images(listed, names, of_rows, findings)
    known = known or _classes(path, labels.values(), () if listed.labelled else listed.others)
    kept, targets = _targets(path, labels, known, findings)
    if not kept or not targets.any():
        why = "\n  ".join(["", *findings.lines(10)])
        raise ValueError(f"{path}: no image with a label{why}")
    for label in np.flatnonzero(~targets.any(0)).tolist():
        findings.add(EMPTY, str(path), known[label], "no image has this label")
    return MultiLabelled(files, kept, targets, known, findings, reading)


class MultiLabelled(ImageFiles):
    """Image files; targets: bool [n, K], the labels that each has."""

    def __init__(
        self,
        files: Files,
        names: Sequence[str],
        targets: np.ndarray,
        classes: Classes,
        findings: DataProblems,
        reading: Reading = PHOTOS,
    ) -> None:
        super().__init__(files, names, reading)
        self.targets, self.classes, self.findings = targets, classes, findings
        digest = hashlib.sha256(files.fingerprint(names).encode())
        for part in ("\n".join(self.names), "\n".join(classes), str(classes.category_ids)):
            digest.update(part.encode())
        digest.update(np.packbits(targets).tobytes())
        self.fingerprint = digest.hexdigest()

    def __getitem__(self, index: int) -> Example:
        name = self.names[index]
        return Example(name, self.files.path(name), self.photo(index), self.targets[index].astype(np.float32))


def _in_column(listed: ImageList, known: Classes | None) -> list[list[str]]:
    """The labels of each row, of one column; none: without a label."""
    texts = [row.label or row.class_name for row in listed.rows]
    separator = next((mark for mark in _SEPARATORS if any(mark in text for text in texts)), None)
    if separator is None:
        names = set(known or ()) | {str(number) for number in (known.category_ids if known else ())}
        words = {word for text in texts for word in text.split()}
        spaced = next((row for row, text in zip(listed.rows, texts, strict=True) if len(text.split()) > 1), None)
        if spaced is not None and not words <= names and not set(texts) - {""} <= names:
            raise ValueError(
                f"{listed.path}, line {spaced.line}: {shown(spaced.label or spaced.class_name)} may be one label or "
                f"several; separate labels by {SEPARATOR}, or name the labels in data.*.classes"
            )
        if spaced is None or not words <= names:
            return [[text] if text else [] for text in texts]
    return [[part.strip() for part in text.split(separator) if part.strip()] for text in texts]


def _in_columns(listed: ImageList, known: Classes | None) -> list[list[str] | str]:
    """The labels of each row, of one column each; a text: why it has none."""
    columns = list(known or listed.others)
    missing = [name for name in columns if name not in listed.others]
    if missing or not columns:
        what = f"no column {shown(missing[0])}" if missing else "no column of labels"
        raise ValueError(f"{listed.path}: {what}; expected a column labels (cat|dog), or one of 0 and 1 for each label")
    places = [listed.others.index(name) for name in columns]
    found: list[list[str] | str] = []
    for row in listed.rows:
        values = [row.others[place].lower() for place in places]
        wrong = next((place for place, value in enumerate(values) if value not in _ON | _OFF), None)
        if wrong is None:
            found.append([name for name, value in zip(columns, values, strict=True) if value in _ON])
        else:
            found.append(f"{columns[wrong]} is {values[wrong]!r}, neither 0 nor 1")
    bad = [text for text in found if isinstance(text, str)]
    if len(bad) == len(found) and bad:
        raise ValueError(f"{listed.path}: {shown(bad[0])} in every row; name the columns of labels in data.*.classes")
    return found


def _of_images(
    listed: ImageList, names: Sequence[str | None], of_rows: Sequence[list[str] | str], findings: DataProblems
) -> dict[str, list[str]]:
    """The labels of each image; rows that cannot be used become findings."""
    labels: dict[str, list[str]] = {}
    where, in_columns = str(listed.path), not listed.labelled
    for row, name, found in zip(listed.rows, names, of_rows, strict=True):
        line = f"line {row.line}"
        findings.labels += 1
        if name is None:
            findings.add("missing image", where, line, f"{row.file} is not there", lost=1)
        elif isinstance(found, str):
            findings.add("bad label", where, line, f"{row.file}: {found}", lost=1)
        elif not found and not in_columns:
            findings.add(NO_LABEL, where, line, f"{row.file} has no label", lost=1)
        elif in_columns and labels.get(name, found) != found:
            findings.add("image listed twice", where, line, f"{row.file} has other labels on an earlier line", lost=1)
        else:
            labels[name] = list(dict.fromkeys([*labels.get(name, ()), *found]))
    return labels


def _classes(path: Path, labels: Collection[list[str]], columns: Sequence[str]) -> Classes:
    """The labels that occur, in their order; of a csv with a column for each, those columns."""
    if columns:
        return Classes(columns)
    names = {label for of_image in labels for label in of_image}
    if names and all(name.isdecimal() for name in names):
        return of_numbers({int(name): name for name in names})
    return Classes(sorted(names))


def _targets(
    path: Path, labels: Mapping[str, list[str]], known: Classes, findings: DataProblems
) -> tuple[list[str], np.ndarray]:
    """The images whose labels are all known, and bool [n, K]."""
    places = {str(number): place for place, number in enumerate(known.category_ids)} if known else {}
    places |= {name: place for place, name in enumerate(known)}
    kept, rows = [], []
    for name, of_image in labels.items():
        unknown = next((label for label in of_image if label not in places), None)
        if unknown is not None:
            findings.add(UNKNOWN, str(path), name, f"{unknown} is not one of the {len(known)} labels", lost=1)
            continue
        target = np.zeros(len(known), dtype=bool)
        target[[places[label] for label in of_image]] = True
        kept.append(name)
        rows.append(target)
    return kept, np.array(rows, dtype=bool).reshape(len(rows), len(known))
