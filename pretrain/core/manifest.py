"""The manifest of a folder: size and sha256 of its files, and a hash of the manifest itself. No torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from pretrain.core.files import open_file, read_bytes

MANIFEST = "MANIFEST.json"
SHOWN = 12  # digits of a sha256 in a message
_CHUNK = 1 << 24


class ManifestError(ValueError):
    """A manifest is missing or not readable; the message does not name its folder."""


@dataclass(frozen=True)
class FileRecord:
    """A file that has been written and fsynced."""

    name: str
    size: int
    sha256: str


class HashedFile:
    """A new file that is hashed while written and fsynced at the end. The path must not exist."""

    def __init__(self, path: Path):
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._hash, self._size = hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        for at in range(0, len(view), _CHUNK):
            chunk = view[at : at + _CHUNK]
            self._hash.update(chunk)
            while chunk:
                chunk = chunk[os.write(self._fd, chunk) :]
        self._size += len(view)

    @property
    def record(self) -> FileRecord:
        return FileRecord(self.path.name, self._size, self._hash.hexdigest())

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                os.fsync(self._fd)
        finally:
            os.close(self._fd)


def write_file(path: Path, data: bytes) -> FileRecord:
    with HashedFile(path) as file:
        file.write(data)
    return file.record


def record_of(path: Path) -> FileRecord:
    """Size and sha256 of an existing file."""
    with open_file(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(path.name, file.tell(), digest)


def difference(folder: Path, record: FileRecord) -> str | None:
    """How a file differs from its record, after it was read completely; None: it does not."""
    path = folder / record.name
    try:
        size = path.stat().st_size
        if size != record.size:
            return f"{record.name} has {size} bytes, the manifest records {record.size}"
        found = record_of(path).sha256
    except OSError as error:
        return f"{record.name}: {error.strerror or error}"
    if found != record.sha256:
        wrong, right = found[:SHOWN], record.sha256[:SHOWN]
        return f"{record.name} has changed since it was written: sha256 {wrong}, the manifest records {right}"
    return None


def render(files: Iterable[FileRecord], facts: Mapping[str, Any]) -> bytes:
    """The content of a manifest. facts: JSON that is kept in it, before the files."""
    body = {**facts, "files": [asdict(file) for file in files]}
    # A round trip through JSON, so that the hash is of the values that will be read.
    return _sealed(json.loads(json.dumps(body)))


def read_body(folder: Path) -> dict[str, Any]:
    """The facts of a manifest and "files", checked against its own hash; no other file is opened.

    Raises:
        ManifestError: it is missing or was changed.
    """
    try:
        raw = read_bytes(folder / MANIFEST)
        body = json.loads(raw)["body"]
    except FileNotFoundError:
        raise ManifestError(f"no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ManifestError(f"{MANIFEST} is not readable ({error})") from None
    if raw != _sealed(body):
        raise ManifestError(f"{MANIFEST} does not match its own hash")
    return body


def files_of(body: Mapping[str, Any]) -> tuple[FileRecord, ...]:
    """The files of `read_body`.

    Raises:
        ManifestError: it lists none, or a file outside its folder.
    """
    try:
        found = tuple(FileRecord(**file) for file in body["files"])
    except (KeyError, TypeError) as error:
        raise ManifestError(f"{MANIFEST} lists no files ({error!r})") from None
    outside = [file.name for file in found if Path(file.name).name != file.name]
    if outside:
        raise ManifestError(f"{MANIFEST} lists a file outside its folder: {outside[0]!r}")
    return found


def _sealed(body: Any) -> bytes:
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps({"body": body, "sha256": digest}, indent=1).encode()
