"""Atomic checkpoint folders: a folder is complete or does not exist. File system part, no torch.

Files are written to `.tmp-step-N-<id>/`, each hashed while written and fsynced; then the manifest with their sizes and
hashes; then one rename to `step-N/`. A folder is a checkpoint if and only if its manifest verifies.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.core.files import new_folder, publish_folder, write_text
from pretrain.core.machine.failures import EXIT_NO_CHECKPOINT
from pretrain.core.manifest import (
    MANIFEST,
    FileRecord,
    ManifestError,
    difference,
    files_of,
    read_body,
    render,
    write_file,
)

_FORMAT = 1
_NAME = re.compile(r"step-\d{8,}")


class CheckpointError(Exception):
    """A checkpoint could not be written or read; the message names it. status: the exit status of a run."""

    status = EXIT_NO_CHECKPOINT

    def __init__(self, message: str, *, status: int | None = None):
        super().__init__(message)
        self.status = status or self.status


class DamagedError(CheckpointError):
    """The folder does not match its manifest."""

    def __init__(self, folder: Path, reason: str):
        super().__init__(f"checkpoint {folder}: {reason}")
        self.folder, self.reason = folder, reason


@dataclass(frozen=True)
class Manifest:
    """step: completed optimizer steps. about: JSON of the caller (see `seal`)."""

    step: int
    files: tuple[FileRecord, ...]
    about: Mapping[str, Any]

    @property
    def is_healthy(self) -> bool:
        """No non-finite step since the previous checkpoint and no active alarm; a run may rewind to it."""
        return self.about.get("healthy", True)


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def begin(root: Path, step: int, token: str) -> Path:
    """The new, empty folder to write the files of `step` into."""
    return new_folder(step_folder(root, step), token)


def seal(temp: Path, final: Path, *, step: int, files: Sequence[FileRecord], about: Mapping[str, Any]) -> None:
    """Write the manifest and rename the folder to `final`. When this returns, the checkpoint survives a power failure.

    Args:
        files: records of all ranks. about: kept in the manifest, JSON.
    """
    write_file(temp / MANIFEST, render(files, {"format": _FORMAT, "step": step, "about": dict(about)}))
    publish_folder(temp, final, files_synced=True)


def read_manifest(folder: Path) -> Manifest:
    """The manifest, checked against its own hash; the files are not opened.

    Raises:
        DamagedError: it is missing or was changed, or the folder name is that of another step.
    """
    try:
        body = read_body(folder)
        files = files_of(body)
    except ManifestError as error:
        raise DamagedError(folder, str(error)) from None
    if body["format"] != _FORMAT:
        raise CheckpointError(f"checkpoint {folder}: format {body['format']}, this program reads {_FORMAT}")
    if _NAME.fullmatch(folder.name) and step_of(folder) != body["step"]:
        raise DamagedError(folder, f"it contains step {body['step']}, which does not match its name; rename it back")
    return Manifest(body["step"], files, body["about"])


def verify_files(folder: Path, files: Sequence[FileRecord]) -> None:
    """Read `files` completely and compare them with their records.

    Raises:
        DamagedError: the message names the first file that differs.
    """
    for record in files:
        if found := difference(folder, record):
            raise DamagedError(folder, found)


def verify(folder: Path) -> Manifest:
    """The manifest, after a check of every file. Raises DamagedError."""
    manifest = read_manifest(folder)
    verify_files(folder, manifest.files)
    return manifest


def checkpoints(root: Path) -> list[Path]:
    """Folders with names of checkpoints, newest first; not verified."""
    found = [path for path in root.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def newest_complete(root: Path) -> Path:
    """The newest checkpoint that verifies; not collective.

    Raises:
        CheckpointError: there is none.
    """
    damaged: list[str] = []
    for folder in checkpoints(root):
        try:
            verify(folder)
        except DamagedError as damage:
            damaged.append(str(damage))
        else:
            return folder
    why = "\n  ".join(["no checkpoint is complete:", *damaged]) if damaged else f"no checkpoint in {root} yet"
    raise CheckpointError(why)


def clean(root: Path) -> list[str]:
    """Remove the remains of killed processes and return their names. Call only under the lease, at the start."""
    left = sorted([*root.glob(".tmp-step-*"), *root.glob(".trash-*"), *root.glob(".latest.*.tmp")])
    for path in left:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return [path.name for path in left]


def prune(root: Path, *, newest: int, keep_last: int, milestone_every: int, protected: int | None = None) -> list[str]:
    """Delete all but the last `keep_last` up to `newest` and the multiples of `milestone_every` (0: no milestones).

    Also kept: the `protected` step, and steps after `newest` (damaged ones, which a run that resumed from an earlier
    checkpoint will write again).

    Call it only after `newest` is verified. A folder is renamed before it is deleted: a partly deleted one is never
    taken for a checkpoint.
    """
    gone: list[str] = []
    for path in [path for path in checkpoints(root) if step_of(path) <= newest][keep_last:]:
        step = step_of(path)
        if (milestone_every and step % milestone_every == 0) or step == protected:
            continue
        _remove(path)
        gone.append(path.name)
    return gone


def remove_after(root: Path, step: int) -> list[str]:
    """Delete the checkpoints after `step`, newest first; return their names."""
    late = [path for path in checkpoints(root) if step_of(path) > step]
    for path in late:
        _remove(path)
    return [path.name for path in late]


def _remove(path: Path) -> None:
    trash = path.with_name(f".trash-{path.name}")
    shutil.rmtree(trash, ignore_errors=True)
    path.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def point_latest(root: Path, folder: Path) -> None:
    """Write the file `latest`, a hint for people and scripts; Fovea does not read it."""
    write_text(root / "latest", folder.name + "\n")
