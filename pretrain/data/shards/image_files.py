"""Which files of a folder, and which members of a sample, are images."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".dcm", ".dicom", ".npy"})
# Of a sample's image member, the first that it has.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "webp", "png", "tif", "tiff", "dcm", "npy")
_FRAME = re.compile(rf"(\d+)\.({'|'.join(IMAGE_EXTENSIONS)})")
MIN_DIGITS = 4  # of the numbers of frames, where names alone must tell a clip from photos such as img_1.0.jpg


def frame_number(extension: str, min_digits: int = 1) -> int | None:
    """The number of a frame of a clip, from its member's extension (12 for "0012.jpg"); None: it is no frame."""
    found = _FRAME.fullmatch(extension)
    return int(found[1]) if found is not None and len(found[1]) >= min_digits else None


def frame_members(extensions: Iterable[str]) -> list[str]:
    """The members of a clip that are frames, in the order of their numbers; of an image its one member; else none."""
    found = list(extensions)
    numbered = {name: number for name in found if (number := frame_number(name)) is not None}
    if numbered:
        return sorted(numbered, key=lambda name: (numbered[name], name))
    return [name for name in IMAGE_EXTENSIONS if name in found][:1]


def walk(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Everything below `folder` that is no folder: links followed, hidden names left out, in no order."""
    pending = [(str(folder), frozenset({folder.resolve()}))]
    while pending:
        here, above = pending.pop()
        with os.scandir(here) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".")]
        for entry in found:
            if not _is_folder(entry):
                yield entry
                continue
            real = Path(entry.path).resolve()
            if real not in above:  # a link to a folder above would never end
                pending.append((entry.path, above | {real}))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one; a link that leads nowhere or to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False
