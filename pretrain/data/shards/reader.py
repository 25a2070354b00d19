"""Read one sample by its number: positional reads through the index, every byte checked by crc32c."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Collection
from typing import Any

import google_crc32c

from pretrain.core.text import shown
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.exclusion import name_of
from pretrain.data.shards.opener import open_shard
from pretrain.data.shards.sidecar import ShardIndex, read_sidecar

MAX_OPEN = 64  # shards


def open_limit(dataset: Dataset, block_shards: int) -> int:
    """How many shards a training run keeps open: of each set of a mixture, two blocks that it shuffles."""
    sets = len(dataset.mixture.names) if dataset.mixture else 1
    return max(MAX_OPEN, 2 * sets * block_shards)


class BadSample(Exception):  # noqa: N818
    """A sample that cannot be used: `shard` (file name), `key`, `member` (extension, "" for all), `reason`."""

    def __init__(self, shard: str, key: str, member: str, reason: str) -> None:
        super().__init__(shown(f"{shard}: sample {key}" + (f", member {member}" if member else "") + f": {reason}"))
        self.shard, self.key, self.member, self.reason = shard, key, member, reason

    def __reduce__(self) -> tuple[type, tuple[str, str, str, str]]:
        return type(self), (self.shard, self.key, self.member, self.reason)


class Reader:
    """Reads samples of a data set. Opens shards when first needed and keeps the last `max_open` open.

    A copy made by pickling (a worker process) opens its own files. Not thread-safe.
    """

    def __init__(self, dataset: Dataset, *, max_open: int = MAX_OPEN) -> None:
        if max_open < 1:
            raise ValueError(f"max_open must be at least 1, got {max_open}")
        self.dataset = dataset
        self.max_open = max_open
        self._open: OrderedDict[int, tuple[int, ShardIndex]] = OrderedDict()

    def read(self, shard: int, sample: int, *, only: Collection[str] | None = None) -> dict[str, Any]:
        """Sample `sample` of shard `shard`: `__key__`, `__url__`, and bytes by extension (those in `only`, if given).

        BadSample when the bytes cannot be read or are not those that were indexed; ValueError when the shard or its
        index is missing or was replaced; IndexError when there is no such sample.
        """
        fd, index = self._shard(shard)
        if not 0 <= sample < self.dataset.counts[shard]:
            count = self.dataset.counts[shard]
            raise IndexError(f"{self.dataset.names[shard]} has {count} samples, requested {sample}")
        sample = self.dataset.stored(shard, sample)
        result: dict[str, Any] = {"__key__": index.key(sample), "__url__": self.dataset.paths[shard]}
        for member in range(index.first[sample], index.first[sample + 1]):
            extension = index.extensions[index.extension[member]]
            if only is not None and extension not in only:
                continue
            length = int(index.length[member])
            try:
                data = _read_at(fd, length, int(index.offset[member]))
            except OSError as error:
                reason = f"cannot be read: {error.strerror}"
                raise BadSample(self.dataset.names[shard], result["__key__"], extension, reason) from error
            if len(data) != length:
                reason = f"the shard ends inside it: {len(data)} of {length} bytes"
                raise BadSample(self.dataset.names[shard], result["__key__"], extension, reason)
            if google_crc32c.value(data) != index.crc32c[member]:
                raise BadSample(self.dataset.names[shard], result["__key__"], extension, "crc32c mismatch")
            result[extension] = data
        return result

    def extensions(self, shard: int, sample: int) -> list[str]:
        """The extensions of a sample's members, without reading them."""
        index, sample = self._shard(shard)[1], self.dataset.stored(shard, sample)
        return [index.extensions[number] for number in index.extension[index.first[sample] : index.first[sample + 1]]]

    def key(self, shard: int, sample: int) -> str:
        """The key of a sample, without reading it."""
        return self._shard(shard)[1].key(self.dataset.stored(shard, sample))

    def named(self, name: str) -> dict[str, Any]:
        """The sample SHARD/KEY (`exclusion.name_of`), read completely; ValueError if there is none."""
        for shard, file in enumerate(self.dataset.names):
            if name.startswith(name_of(file, "")):
                for sample in range(int(self.dataset.counts[shard])):
                    if name_of(file, self.key(shard, sample)) == name:
                        return self.read(shard, sample)
        raise ValueError(f"{shown(name)} is no sample of {self.dataset.paths[0]} ...")

    def close(self) -> None:
        """Close every open shard; the next read opens what it needs again."""
        for fd, _ in self._open.values():
            os.close(fd)
        self._open.clear()

    def _shard(self, shard: int) -> tuple[int, ShardIndex]:
        if shard not in self._open:
            return self._open_shard(shard)
        self._open.move_to_end(shard)
        return self._open[shard]

    def _open_shard(self, shard: int) -> tuple[int, ShardIndex]:
        row, path = self.dataset.rows[shard], self.dataset.paths[shard]
        index = read_sidecar(self.dataset.sidecar(shard))
        if (index.sha256, len(index)) != (row.sha256, row.count):
            raise ValueError(f"{self.dataset.sidecar(shard)}: not of the {row.name} in dataset.json; index it again")
        fd = open_shard(path)
        size = os.fstat(fd).st_size
        if size != row.bytes:
            os.close(fd)
            raise ValueError(f"{path} has {size} bytes, its index has {row.bytes}: truncated or replaced")
        while len(self._open) >= self.max_open:
            _, (oldest, _) = self._open.popitem(last=False)
            os.close(oldest)
        self._open[shard] = fd, index
        return fd, index

    def __getstate__(self) -> dict[str, Any]:
        return {"dataset": self.dataset, "max_open": self.max_open, "_open": OrderedDict()}

    def __del__(self) -> None:
        self.close()


def _read_at(fd: int, length: int, offset: int) -> bytes:
    """`length` bytes at `offset`, fewer only at the end of the file. The kernel may return fewer per call."""
    data = os.pread(fd, length, offset)
    while len(data) < length and (more := os.pread(fd, length - len(data), offset + len(data))):
        data += more
    return data
