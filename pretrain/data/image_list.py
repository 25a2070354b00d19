"""A list of images: a csv of file names and, perhaps, labels. `fovea data write` and `fovea finetune` read it here."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.core.files import read_bytes, read_text
from pretrain.core.text import shown

SUFFIXES = frozenset({".csv", ".tsv"})
FILE_COLUMNS = ("filename", "file_name", "path", "file", "file_path", "filepath", "image", "image_path", "image_name")
_LABEL_COLUMNS, _NAME_COLUMNS = ("label", "labels", "target"), ("class_name", "class", "category")
_DELIMITERS = (",", ";", "\t", "|")
_MISSING = frozenset({"", "nan", "<na>"})  # what pandas writes for no value


@dataclass(frozen=True)
class ListedImage:
    """One row: the number of its line, the file as it is named, its label (a number or a name) and class name, "" for
    none; others: the values of `ImageList.others`."""

    line: int
    file: str
    label: str
    class_name: str
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageList:
    """The rows of a list, whether it has a column of labels or of class names, and the names of its other columns."""

    path: Path
    rows: list[ListedImage]
    labelled: bool
    others: tuple[str, ...] = ()


def read_list(path: Path, *, others: bool = False) -> ImageList:
    """Read a csv whose first line names the columns, in upper or lower case, with or without spaces around.

    Files are in the first column named as one of `FILE_COLUMNS`; labels in `label`, `labels` or `target`; class names
    in `class_name`, `class` or `category`. The delimiter is a comma, semicolon, tab or bar.

    Args:
        others: keep the values of all other columns too.

    Raises:
        ValueError: it cannot be read, is not UTF-8, has no such column, or a row names no file or has too many fields.
    """
    try:
        text = read_text(path, encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = read_bytes(path)[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}: not UTF-8 in line {line}; save the list as UTF-8") from error
    head = text.partition("\n")[0]
    delimiter = max(_DELIMITERS, key=head.count)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter, skipinitialspace=True)
    rows: list[ListedImage] = []
    try:
        columns: dict[str, int] = {}
        header = [name.strip() for name in next(reader, [])]
        for place, name in enumerate(header):
            columns.setdefault(name.lower() or f"column {place + 1}", place)
        known = {columns[name] for name in (*FILE_COLUMNS, *_LABEL_COLUMNS, *_NAME_COLUMNS) if name in columns}
        kept = [place for place in range(len(header)) if place not in known] if others else []
        labelled = _read_rows(path, reader, columns, rows, kept)
    except csv.Error as error:
        last = rows[-1].line if rows else 1
        raise ValueError(f"{path}, after line {last}: {error}; is a quote left open?") from error
    return ImageList(path, rows, labelled, tuple(header[place] for place in kept))


def _read_rows(
    path: Path, reader: Any, columns: Mapping[str, int], rows: list[ListedImage], kept: Sequence[int]
) -> bool:
    """Append the rows, with the values of the columns `kept`; whether they have labels."""

    def first(names: tuple[str, ...]) -> int | None:
        return next((columns[name] for name in names if name in columns), None)

    files, labels, names = first(FILE_COLUMNS), first(_LABEL_COLUMNS), first(_NAME_COLUMNS)
    if files is None:
        have = f"its first line has: {shown(', '.join(columns)) or 'nothing'}"
        raise ValueError(f"{path}: no column named {' or '.join(FILE_COLUMNS)}; {have}")
    width = max(columns.values()) + 1
    for fields in reader:
        values = [field.strip() for field in fields]
        if not any(values):
            continue
        line = reader.line_num
        if any(values[width:]):
            raise ValueError(
                f"{path}, line {line}: {len(values)} fields, but {width} columns; put quotes around a name that "
                "holds the delimiter"
            )
        values += [""] * (width - len(values))
        if not values[files]:
            raise ValueError(f"{path}, line {line}: no file name")
        label, name = ("" if column is None else _known(values[column]) for column in (labels, names))
        rows.append(ListedImage(line, values[files], label, name, tuple(values[place] for place in kept)))
    return labels is not None or names is not None


def _known(value: str) -> str:
    return "" if value.lower() in _MISSING else value
