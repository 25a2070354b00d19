"""The manifest of a release or an export: a file that changed after it was written is refused when it is opened.

Listed are the files that programs read: weights, fovea.json, config.json, graphs. README.md and files that a person
adds (a licence, pictures) are not. The hashes find damage; they do not say who wrote a release. No torch here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from pretrain.core.files import write_bytes
from pretrain.core.manifest import (
    MANIFEST,
    FileRecord,
    ManifestError,
    difference,
    files_of,
    read_body,
    record_of,
    render,
)

FORMAT = 1
WEIGHTS, HEADS, RECORD, TIMM = "model.safetensors", "heads.safetensors", "fovea.json", "config.json"
EXPORT = "export.json"
FEATURES_PT2, FEATURES_ONNX = "features.pt2", "features.onnx"
# A file of these names is read if it exists, so one that the manifest does not list is refused.
READ = (WEIGHTS, HEADS, RECORD, TIMM)
GRAPHS = (FEATURES_PT2, FEATURES_ONNX)  # read by others


class DamagedReleaseError(ValueError):
    """A file of the release is not the one that was written; the message names it and the way out."""


class NotFiniteError(ValueError):
    """Weights with NaN or an infinite value are to be released or opened."""


def write_manifest(folder: Path, names: Iterable[str]) -> None:
    """Hash the files `names` of `folder` and write its manifest. Write it after every other file."""
    records = [record_of(folder / name) for name in sorted(names)]
    write_bytes(folder / MANIFEST, render(records, {"format": FORMAT, "kind": "release"}))


def check_release(folder: Path) -> None:
    """`compare`; a release without a manifest gives one line on stderr."""
    if compare(folder) is None and (folder / RECORD).is_file():
        _say_unhashed(folder)


def compare(folder: Path) -> tuple[FileRecord, ...] | None:
    """The files of a release or an export, each read completely and compared; None: no manifest (version 0.1.0).

    Raises:
        DamagedReleaseError: a file is missing, changed, or not listed although it would be read.
    """
    if (folder / MANIFEST).is_file():
        return _compared(folder)
    record = folder / RECORD
    if record.is_file() and _names_a_manifest(record):
        raise _damaged(folder, f"{MANIFEST} is missing")
    return None


def check_file(path: Path) -> None:
    """Compare a file with the manifest of its folder, if one lists it.

    Raises:
        DamagedReleaseError: it has changed.
    """
    try:
        files = files_of(read_body(path.parent))
    except ManifestError:  # none, or that of another project
        return
    for file in files:
        if file.name == path.name and (found := difference(path.parent, file)):
            raise _damaged(path.parent, found)


def source_problem(path: Path) -> str | None:
    """Why weights at `path` cannot be opened, as far as the file system and a manifest tell; None: nothing found."""
    if not path.exists():
        return f"{path} does not exist; `fovea release RUN OUT` writes a release"
    try:
        if path.is_dir():
            compare(path)
        else:
            check_file(path)
    except ValueError as error:
        return str(error)
    return None


def files_to_seal(folder: Path) -> list[str]:
    """Names of the files of a release that a manifest lists.

    Raises:
        ValueError: it is no release.
    """
    names = [name for name in (*READ, *GRAPHS) if (folder / name).is_file()]
    if RECORD not in names or WEIGHTS not in names:
        raise ValueError(f"{folder}: not a release: it has no {RECORD if RECORD not in names else WEIGHTS}")
    return names


def _compared(folder: Path) -> tuple[FileRecord, ...] | None:
    try:
        body = read_body(folder)
        if body.get("kind") != "release":  # that of a checkpoint, which is no release
            return None
        files = files_of(body)
    except ManifestError as error:
        raise _damaged(folder, str(error)) from None
    if body.get("format") != FORMAT:
        raise ValueError(f"{folder}: format {body.get('format')} of {MANIFEST}; this version reads {FORMAT}")
    for file in files:
        if found := difference(folder, file):
            raise _damaged(folder, found)
    listed = {file.name for file in files}
    more = [name for name in READ if name not in listed and (folder / name).exists()]
    if more and EXPORT not in listed:
        raise _damaged(folder, f"{more[0]} was added after the release was written")
    return files


def _damaged(folder: Path, what: str) -> DamagedReleaseError:
    return DamagedReleaseError(
        f"{folder}: damaged: {what}; copy it again from where it was written, or accept a change of yours with "
        f"`fovea release seal {folder}`"
    )


def _names_a_manifest(record: Path) -> bool:
    try:
        loaded = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # reported when it is read
        return False
    return isinstance(loaded, dict) and "manifest" in loaded


@cache
def _say_unhashed(folder: Path) -> None:
    from pretrain.core import distributed

    if distributed.rank() == 0:
        line = f"{folder}: written without hashes, damage cannot be found; `fovea release seal {folder}` adds them"
        print(line, file=sys.stderr, flush=True)
