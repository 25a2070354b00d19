"""Files by name in a folder, plain tars or indexed shards: images, masks and depth maps are all read here.

Nothing is unpacked. Tars are read with the strict walker of pretraining (`pretrain.data.shards.tar`), shards by their
index; the crc32c of every file in them is checked when it is read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import google_crc32c
import numpy as np

from finetune.data.examples import BadExample
from pretrain.core.files import open_file, read_bytes
from pretrain.core.text import shown
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.image_files import SUFFIXES, walk
from pretrain.data.shards.listing import expand, is_shard
from pretrain.data.shards.opener import local_path, open_shard
from pretrain.data.shards.sidecar import read_sidecar, sidecar_path
from pretrain.data.shards.tar import Walker

Member = tuple[str, int, int, int]  # name, offset and length in its container in bytes, crc32c (-1 in a folder)


@dataclass(frozen=True, eq=False)
class _Table:
    """Row i is the file names[i] in containers[of[i]]."""

    names: tuple[str, ...]
    of: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    crc: np.ndarray


class Files:
    """Read-only files. A pickled copy (in a worker) opens its own descriptors. Not thread-safe.

    Attributes:
        where: as given, for messages.
        names: sorted; relative to the folder, or those in the tars: key and extension in a shard.
    """

    def __init__(self, where: str, containers: Sequence[Path], table: _Table, *, content: str, folder: Path | None):
        self.where, self.names = where, table.names
        self._containers, self._table, self._content, self._folder = tuple(containers), table, content, folder
        self._rows: dict[str, int] | None = None
        self._descriptors: dict[int, int] = {}

    @staticmethod
    def open(where: str | Path | Sequence[str | Path]) -> Files:
        """A folder of files, a folder of tars, a tar, or a brace pattern, glob or list of tars.

        Raises:
            ValueError: nothing exists there, it has no file, a tar is damaged or unsafe, or a name is in two tars.
        """
        text = str(where) if isinstance(where, str | Path) else ", ".join(str(item) for item in where)
        if isinstance(where, str | Path):
            path = local_path(str(where))
            if path.is_dir() and not any(map(is_shard, path.iterdir())):
                return _open_folder(text, path)
            if path.is_file() and not is_shard(path):
                raise ValueError(f"{path}: expected a folder, a .tar or shards")
            if not path.exists() and "{" not in text and "*" not in text:
                raise ValueError(f"{path}: no such file or folder")
        return _open_tars(text, expand(where))

    @staticmethod
    def listed(folder: Path, names: Iterable[str]) -> Files:
        """The files `names`, absolute or relative to `folder`; its other files are not read."""
        found = sorted(set(names))
        sizes = np.array([_size(folder / name) for name in found], dtype=np.int64)
        nowhere = np.zeros(len(found), dtype=np.int64)
        table = _Table(tuple(found), nowhere, nowhere, sizes, nowhere)
        return Files(str(folder), [folder], table, content="", folder=folder)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: str) -> bool:
        return name in self._index()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def size(self, name: str) -> int:
        """Size of a file in bytes; KeyError if there is no such file."""
        return int(self._table.length[self._index()[name]])

    def fingerprint(self, names: Iterable[str]) -> str:
        """sha256 hex of these files: in a folder of their names and sizes, in tars and shards of the complete content.

        Other files of a folder do not count: the folder may grow during a run.

        Raises:
            ValueError: a name that is not UTF-8.
        """
        digest = hashlib.sha256(self._content.encode())
        for name in names:
            try:
                digest.update(f"{name}\0{self.size(name)}\n".encode())
            except UnicodeEncodeError as error:
                raise ValueError(f"{self.where}: the name {os.fsencode(name)!r} is not UTF-8; rename it") from error
        return digest.hexdigest()

    def path(self, name: str) -> str:
        """The path of a file, for messages: "folder/name", or "shard.tar/name"."""
        row = self._index()[name]
        if self._folder is not None:
            return str(self._folder / name)  # the name may be absolute
        return f"{self._containers[self._table.of[row]]}/{name}"

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            BadExample: it does not exist, cannot be read, or differs from what was indexed.
        """
        row = self._index().get(name)
        if row is None:
            raise BadExample(f"{self.where}/{name}", "no such file")
        if self._folder is not None:
            try:
                return read_bytes(self._folder / name)
            except OSError as error:
                raise BadExample(f"{self._folder}/{name}", f"cannot be read: {error.strerror}") from error
        of, length = int(self._table.of[row]), int(self._table.length[row])
        if of not in self._descriptors:
            self._descriptors[of] = open_shard(str(self._containers[of]))
        try:
            data = os.pread(self._descriptors[of], length, int(self._table.offset[row]))
        except OSError as error:
            raise BadExample(self.path(name), f"cannot be read: {error.strerror}") from error
        if len(data) != length or google_crc32c.value(data) != int(self._table.crc[row]):
            raise BadExample(self.path(name), "not the bytes that were indexed (crc32c)")
        return data

    def head(self, name: str, size: int) -> bytes:
        """The first `size` bytes of a file, not checked against the index; BadExample if it cannot be read."""
        row = self._index()[name]
        of, offset = int(self._table.of[row]), int(self._table.offset[row])
        path = self._containers[of] if self._folder is None else self._folder / name
        try:
            with open_file(path) as file:
                file.seek(offset)
                return file.read(min(size, int(self._table.length[row])))
        except OSError as error:
            raise BadExample(self.path(name), f"cannot be read: {error.strerror}") from error

    def close(self) -> None:
        """Close the descriptors; the next read opens them again."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _index(self) -> dict[str, int]:
        if self._rows is None:
            self._rows = {name: row for row, name in enumerate(self.names)}
        return self._rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None, "_descriptors": {}}

    def __del__(self) -> None:
        self.close()


def _open_folder(where: str, folder: Path) -> Files:
    try:
        members: list[Member] = [
            (Path(entry.path).relative_to(folder).as_posix(), 0, _size(entry.path), -1)
            for entry in walk(folder)
            if Path(entry.name).suffix.lower() in SUFFIXES
            or Path(entry.path).is_file()  # an image that is no file is unusable
        ]
    except OSError as error:
        why = f"{error.filename}: cannot be read: {error.strerror}"
        raise ValueError(f"{why}; make it readable, or give a folder without it instead of {folder}") from error
    return Files(where, [folder], _table(where, [members]), content="", folder=folder)


def _size(path: Path | str) -> int:
    """Bytes of a file; 0 for a link to nothing, which cannot be read."""
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0


def _open_tars(where: str, tars: Sequence[str]) -> Files:
    paths = [Path(tar) for tar in tars]
    if all(sidecar_path(path, None).is_file() for path in paths):
        opened = Dataset.open(tars)
        paths = [Path(path) for path in opened.paths]
        members = [list(_of_index(opened.sidecar(shard))) for shard in range(len(paths))]
        content = opened.fingerprint
    else:
        walked = [_walk(path) for path in paths]
        members, content = [found for found, _ in walked], " ".join(sorted(sha for _, sha in walked))
    return Files(where, paths, _table(where, members), content=content, folder=None)


def _of_index(sidecar: Path) -> Iterator[Member]:
    index = read_sidecar(sidecar)
    for sample in range(len(index)):
        key = index.key(sample)
        for row in range(index.first[sample], index.first[sample + 1]):
            extension = index.extensions[index.extension[row]]
            yield _plain(f"{key}.{extension}"), int(index.offset[row]), int(index.length[row]), int(index.crc32c[row])


def _walk(path: Path) -> tuple[list[Member], str]:
    """Its regular files, except hidden ones (macOS adds ._a.jpg), and its sha256, in one pass."""
    descriptor = open_shard(str(path))
    try:
        walker = Walker(descriptor, str(path))
        members = [(_plain(member.name), member.offset, member.length, member.crc32c) for member in walker]
        shown = [member for member in members if not any(part[:1] == "." for part in member[0].split("/"))]
        return shown, walker.sha256.hex()
    finally:
        os.close(descriptor)


def _table(where: str, members: Sequence[Sequence[Member]]) -> _Table:
    rows = sorted((name, of, *rest) for of, found in enumerate(members) for name, *rest in found)
    if not rows:
        raise ValueError(f"{where}: no files in it")
    twice = next((a[0] for a, b in pairwise(rows) if a[0] == b[0]), None)
    if twice is not None:
        raise ValueError(f"{where}: {shown(twice)} exists twice")
    names, of, offset, length, crc = zip(*rows, strict=True)
    return _Table(tuple(names), *(np.array(column, dtype=np.int64) for column in (of, offset, length, crc)))


def _plain(name: str) -> str:
    """a/b of ./a/b, as `tar cf set.tar .` writes it."""
    return str(PurePosixPath(name)) if name.startswith("./") or "//" in name or "/./" in name else name
