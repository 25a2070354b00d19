"""Atomic writes: a file or folder is complete or does not exist, also after a kill or a power failure.

Every function writes next to the target, fsyncs, renames, and fsyncs the folder that holds the name. Modes follow the
umask. A failed write leaves the old content, and at most a hidden temporary file or folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def replacing_file(path: Path) -> Generator[BinaryIO, None, None]:
    """A file that replaces `path` when the block ends without an error.

    Raises:
        OSError: names `path`, even if the kernel reports no file name (a full disk).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data`."""
    with replacing_file(path) as file:
        file.write(data)


def write_text(path: Path, text: str, *, errors: str = "strict") -> None:
    """Replace `path` by `text` in UTF-8. errors: of `str.encode`."""
    write_bytes(path, text.encode("utf-8", errors))


def write_json(path: Path, value: Any, *, indent: int = 2) -> None:
    """Replace `path` by `value` as JSON."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


@contextmanager
def replacing_folder(folder: Path) -> Generator[Path, None, None]:
    """An empty folder that replaces `folder` when the block ends without an error."""
    new = new_folder(folder)
    try:
        yield new
        publish_folder(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def new_folder(folder: Path, token: str | None = None) -> Path:
    """An empty folder to write the content of `folder` into, for `publish_folder`.

    Args:
        token: distinguishes it from those of other writers; default: the process id.
    """
    new = folder.with_name(f".tmp-{folder.name}-{os.getpid() if token is None else token}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    return new


def publish_folder(new: Path, folder: Path, *, files_synced: bool = False) -> None:
    """Fsync everything in `new`, then give it the name `folder`; an older folder of that name is removed.

    Args:
        files_synced: every file in `new` has been fsynced by its writer.
    """
    for path in [] if files_synced else sorted(new.rglob("*")):
        sync(path)
    sync(new)
    old = folder.with_name(f".old-{folder.name}-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
