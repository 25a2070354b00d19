"""Class maps whose classes are colours, and the files that list them.

CVAT and Datumaro write labelmap.txt (`name:r,g,b:parts:actions`), CamVid label_colors.txt (`r g b name`), others a csv
with the columns name, r, g, b. The id of a class is the number of its row, from 0.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetune.data.maps.label_maps import Labels, open_map
from finetune.predictions import Classes
from pretrain.core.files import read_text
from pretrain.core.text import shown

FILE = "labelmap.txt"
SUFFIXES = (".txt", ".csv")
_LABELMAP = re.compile(r"(?P<name>[^:]+):(?P<rgb>\d+,\d+,\d+):.*")
_COLOUR_FIRST = re.compile(r"(?P<rgb>\d+\s+\d+\s+\d+)\s+(?P<name>\S.*)")


@dataclass(frozen=True)
class ColourClasses:
    """names, and as many colours (red, green, blue)."""

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]

    def without(self, void_ids: set[int]) -> Classes:
        """The classes whose ids are not void."""
        kept = [place for place in range(len(self.names)) if place not in void_ids]
        return Classes([self.names[place] for place in kept], kept)


def read_colours(path: Path) -> ColourClasses:
    """ValueError if it has none of the forms, or a name or colour twice."""
    try:
        text = read_text(path, encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    rows = _of_csv(text) if path.suffix.lower() == ".csv" else _of_lines(text)
    if not rows:
        raise ValueError(f"{path}: no classes; expected lines name:r,g,b:: or `r g b name`, or a csv of name, r, g, b")
    for which in (0, 1):
        twice = [row[which] for row in rows if Counter(other[which] for other in rows)[row[which]] > 1]
        if twice:
            raise ValueError(f"{path}: {shown(twice[0])} is used by two classes")
    if any(max(colour) > 255 for _, colour in rows):
        raise ValueError(f"{path}: a colour has values from 0 to 255")
    return ColourClasses(tuple(name for name, _ in rows), tuple(colour for _, colour in rows))


class DecodeColours:
    """A map of colours to labels; picklable."""

    def __init__(self, labels: Labels, classes: ColourClasses) -> None:
        self.labels = labels
        packed = np.array(classes.colours, dtype=np.int64) @ _PACK
        self._order = np.argsort(packed)
        self._packed = packed[self._order]

    def __call__(self, data: bytes) -> np.ndarray:
        """Labels uint8 [H, W]; ValueError for a colour that is no class."""
        packed = np.asarray(open_map(data).convert("RGB")).astype(np.int64) @ _PACK
        places = np.minimum(np.searchsorted(self._packed, packed), len(self._packed) - 1)
        unknown = self._packed[places] != packed
        if unknown.any():
            found, counts = np.unique(packed[unknown], return_counts=True)
            some = [
                f"{(v >> 16, v >> 8 & 255, v & 255)} ({n} pixels)"
                for v, n in zip(found[:5].tolist(), counts, strict=False)
            ]
            raise ValueError(
                f"colours that are no class: {', '.join(some)}; add them to the classes, or correct the map"
            )
        return self.labels.of(self._order[places])


_PACK = np.array([1 << 16, 1 << 8, 1])


def _of_lines(text: str) -> list[tuple[str, tuple[int, int, int]]]:
    rows = []
    for line in text.splitlines():
        found = _LABELMAP.fullmatch(line.strip()) or _COLOUR_FIRST.fullmatch(line.strip())
        if found is not None and not line.startswith("#"):
            red, green, blue = (int(value) for value in re.split(r"[,\s]+", found["rgb"]))
            rows.append((found["name"].strip(), (red, green, blue)))
        elif line.strip() and not line.startswith("#"):
            return []
    return rows


def _of_csv(text: str) -> list[tuple[str, tuple[int, int, int]]]:
    try:
        rows = [{str(key).strip().lower(): str(value).strip() for key, value in row.items()}
                for row in csv.DictReader(text.splitlines(), strict=True)]  # fmt: skip
        return [(row["name"], (int(row["r"]), int(row["g"]), int(row["b"]))) for row in rows]
    except (csv.Error, KeyError, ValueError):
        return []
