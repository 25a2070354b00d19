"""Which files of a folder, and which members of a sample, are images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".dcm", ".dicom", ".npy"})
# Of a sample's image member, the first that it has.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "webp", "png", "tif", "tiff", "dcm", "npy")


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
