"""Files of the user are read if they are regular files; what is written is complete or does not exist.

Reading never waits for a pipe and never reads a device without end. Writes are atomic, also under a kill or a power
failure: every function writes next to the target, fsyncs, renames, and fsyncs the folder that holds the name. Modes
follow the umask. A failed write leaves the old content, and at most a hidden temporary file or folder.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class SpecialFileError(OSError):
    """What was to be read as a file is a pipe, device, socket or folder; `strerror` says which."""


def kind_of_special(path: Path | str) -> str | None:
    """ "a named pipe", "a device", "a socket" or "a folder", links followed; None for a regular file or nothing."""
    try:
        return _KINDS.get(stat.S_IFMT(os.stat(path).st_mode))  # noqa: PTH116
    except OSError:
        return None


def check_regular(path: Path | str) -> None:
    """Check before a library opens `path`, which would wait for a pipe and read a device without end.

    Raises:
        SpecialFileError: it is no regular file.
    """
    kind = kind_of_special(path)
    if kind is not None:
        raise SpecialFileError(errno.EINVAL, f"is {kind}, not a regular file", str(path))


def open_descriptor(path: Path | str) -> int:
    """A descriptor of the regular file `path`, for reading; the caller closes it.

    Raises:
        OSError: it cannot be opened. SpecialFileError: it is no regular file.
    """
    check_regular(path)
    # It may be replaced meanwhile: then O_NONBLOCK opens a pipe without waiting for its writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    kind = _KINDS.get(stat.S_IFMT(os.fstat(descriptor).st_mode))
    if kind is not None:
        os.close(descriptor)
        raise SpecialFileError(errno.EINVAL, f"is {kind}, not a regular file", str(path))
    return descriptor


def open_file(path: Path | str) -> io.BufferedReader:
    """The regular file `path`, opened for reading; errors as `open_descriptor`."""
    return open(open_descriptor(path), "rb")


def read_bytes(path: Path | str) -> bytes:
    """The content of the regular file `path`; errors as `open_descriptor`."""
    with open_file(path) as file:
        return file.read()


def read_text(path: Path | str, *, encoding: str = "utf-8") -> str:
    """The text of the regular file `path`, any line end as a newline; errors as `open_descriptor`.

    Raises:
        UnicodeDecodeError: it is in another encoding.
    """
    return io.TextIOWrapper(io.BytesIO(read_bytes(path)), encoding=encoding).read()


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
