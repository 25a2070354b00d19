"""`dataset.json`: one row per shard of a folder, all that the training order needs."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from pretrain.core.files import read_bytes, write_bytes

CATALOG = "dataset.json"
LOCK = ".dataset.lock"
_VERSION = 1


class ShardRow(NamedTuple):
    """A shard: file name, size in bytes, sha256 in hex, number of samples, extensions of its members."""

    name: str
    bytes: int
    sha256: str
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]  # tuple.count is not used
    extensions: tuple[str, ...]


def fingerprint(rows: Iterable[ShardRow]) -> str:
    """sha256 of the sorted rows (name, bytes, sha256, count): a data set's identity in any order."""
    lines = sorted(f"{row.name} {row.bytes} {row.sha256} {row.count}\n" for row in rows)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_rows(folder: Path) -> dict[str, ShardRow]:
    """The rows of `folder/dataset.json` by shard name; empty if there is none. ValueError if it is damaged."""
    path = folder / CATALOG
    try:
        text = read_bytes(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ValueError(f"{path}: cannot read this index: {error.strerror}") from error
    try:
        content = json.loads(text)
        version, recorded = content["version"], content["fingerprint"]
        rows = [ShardRow(**{**row, "extensions": tuple(row["extensions"])}) for row in content["shards"]]
        checksum = content.get("checksum")  # older versions wrote none
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, or not a dataset.json; delete it and run fovea data index again") from error
    if version != _VERSION:
        raise ValueError(f"{path}: version {version}, but this program reads {_VERSION}; index the shards again")
    if recorded != fingerprint(rows) or checksum not in (None, _checksum(rows)):
        raise ValueError(f"{path}: its rows do not match its fingerprint; delete it and run fovea data index again")
    return {row.name: row for row in rows}


def update_rows(folder: Path, rows: Iterable[ShardRow], *, remove: Iterable[str] = ()) -> None:
    """Add or replace `rows` in `folder/dataset.json` and remove those of the shards in `remove`; other rows are kept.

    Processes that index shards of one folder at the same time wait for each other, so that no row is lost.
    """
    with _locked(folder):
        known = read_rows(folder) | {row.name: row for row in rows}
        ordered = [known[name] for name in sorted(set(known) - set(remove))]
        lines = ",\n".join(json.dumps(row._asdict()) for row in ordered)
        identity = f'"fingerprint": "{fingerprint(ordered)}", "checksum": "{_checksum(ordered)}"'
        head = f'{{"version": {_VERSION}, {identity}, "shards": ['
        write_bytes(folder / CATALOG, f"{head}\n{lines}\n]}}\n".encode())


def _checksum(rows: Iterable[ShardRow]) -> str:
    """sha256 of all fields of the rows, including the extensions."""
    lines = sorted(f"{json.dumps(row._asdict())}\n" for row in rows)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder's index; on a file system without locks (Lustre without `flock`) this has no effect.

    The holder removes the lock file at the end, so a process that waited for a removed file tries again.
    """
    path = folder / LOCK
    while True:
        with path.open("w") as file:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(path, file):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
