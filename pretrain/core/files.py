"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends well: temp, fsync, rename, fsync of the folder.

    A kill leaves `path` as it was, and at most a hidden `.tmp` file beside it.
    """
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temp.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temp.rename(path)
    except OSError as error:
        if error.filename is None:  # a full disk: the kernel does not say where
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temp.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_whole(path: Path, data: bytes) -> None:
    """Replace `path` by `data`."""
    with replacing(path) as file:
        file.write(data)
