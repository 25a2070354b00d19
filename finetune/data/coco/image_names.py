"""The files that the names in a COCO file mean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from finetune.data.files import Files
from pretrain.core.text import shown
from pretrain.data.names import Names
from pretrain.data.shards.image_files import SUFFIXES


def find_names(
    path: Path,
    wanted: Mapping[int | str, str],
    files: Files,
    *,
    below: str = "",
    suffixes: Collection[str] = SUFFIXES,
    what: str = "images",
) -> tuple[dict[int | str, str], dict[int | str, str]]:
    """By image id: the names in `files` of those that exist, and the reasons why others have none.

    Args:
        wanted: names as annotated, by image id. below: a folder in `files`, with a slash. suffixes: of candidates.

    Raises:
        ValueError: none exists, or two are one file.
    """
    there = {name[len(below) :]: name for name in files.names if name.startswith(below)}
    names = Names(name for name in there if PurePosixPath(name).suffix.lower() in suffixes)
    matched = names.match(list(wanted.values()))
    found = {id: there[name] for id, name in zip(wanted, matched, strict=True) if name is not None}
    reasons = {id: f"{name} {names.why_not(name)}" for id, name in wanted.items() if id not in found}
    if reasons and not found:
        some = shown(", ".join(sorted(there)[:3])) or "no file"
        raise ValueError(
            f"{path}: none of its {len(wanted)} {what} exists: {next(iter(reasons.values()))} ({some}, ... in "
            f"{files.where}); give the folder of these files, or correct the names"
        )
    twice = next((name for name, count in Counter(found.values()).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"{path}: the {what} {[id for id, name in found.items() if name == twice]} are all {twice}")
    return found, reasons
