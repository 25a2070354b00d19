"""The index file of one shard: `NAME.tar.idx`, a fixed header and plain arrays, about 50 bytes a sample.

Memory-mapped when read; a crc32c at its end covers every byte before it.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np

from pretrain.core.files import open_file, write_bytes

INDEX_VERSION = 1
_MAGIC = b"FOVEAIDX"
# magic, version, samples, members, bytes of keys, bytes of extensions, shard bytes, shard mtime (ns), shard sha256
_HEADER = struct.Struct("<8sIIIII4xQq32s")
_CRC = struct.Struct("<I")


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Sample i of N holds members `first[i]:first[i + 1]` of M; its key is bytes `key_end[i]:key_end[i + 1]` of `keys`.

    offset [M] uint64 and length [M] uint32 in bytes, crc32c [M] uint32, extension [M] uint16 into `extensions`;
    first [N + 1] and key_end [N + 1] uint32.
    """

    offset: np.ndarray
    length: np.ndarray
    crc32c: np.ndarray
    first: np.ndarray
    key_end: np.ndarray
    extension: np.ndarray
    keys: bytes
    extensions: tuple[str, ...]
    shard_bytes: int
    mtime_ns: int
    sha256: str

    def __len__(self) -> int:
        return len(self.first) - 1

    def key(self, sample: int) -> str:
        """The webdataset key of a sample."""
        return self.keys[self.key_end[sample] : self.key_end[sample + 1]].decode()


def sidecar_path(shard: str | Path, index: Path | None) -> Path:
    """The path of a shard's sidecar: next to the shard, or in the folder `index`."""
    path = Path(shard)
    return (path.parent if index is None else index) / f"{path.name}.idx"


def write_sidecar(path: Path, index: ShardIndex) -> None:
    """Write a sidecar atomically."""
    extensions = json.dumps(index.extensions).encode()
    counts = len(index), len(index.offset), len(index.keys), len(extensions)
    head = _HEADER.pack(_MAGIC, INDEX_VERSION, *counts, index.shard_bytes, index.mtime_ns, bytes.fromhex(index.sha256))
    arrays = (index.offset, index.length, index.crc32c, index.first, index.key_end, index.extension)
    body = b"".join([head, *(array.tobytes() for array in arrays), index.keys, extensions])
    write_bytes(path, body + _CRC.pack(google_crc32c.value(body)))


def read_sidecar(path: Path) -> ShardIndex:
    """Map a sidecar into memory. ValueError: missing, damaged or of another version, with the remedy."""
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except FileNotFoundError:
        raise ValueError(f"{path}: no index; create it: fovea data index {path.name.removesuffix('.idx')}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot read this index: {error.strerror}") from error
    remedy = f"create it again with: fovea data index --force {path.name.removesuffix('.idx')}"
    if size < _HEADER.size + _CRC.size or data[: len(_MAGIC)] != _MAGIC:
        raise ValueError(f"{path}: damaged, or not an index; {remedy}")
    content = np.frombuffer(data, dtype=np.uint8)
    if google_crc32c.value(content[: -_CRC.size]) != _CRC.unpack(data[-_CRC.size :])[0]:  # type: ignore[arg-type]
        raise ValueError(f"{path}: damaged index, its checksum is wrong; {remedy}")
    _, version, samples, members, key_bytes, extension_bytes, shard_bytes, mtime, sha = _HEADER.unpack_from(data)
    if version != INDEX_VERSION:
        raise ValueError(f"{path}: index version {version}, but this program reads {INDEX_VERSION}; {remedy}")
    lengths = [
        (np.uint64, members),
        (np.uint32, members),
        (np.uint32, members),
        (np.uint32, samples + 1),
        (np.uint32, samples + 1),
        (np.uint16, members),
    ]
    arrays, at = [], _HEADER.size
    for dtype, count in lengths:
        arrays.append(np.frombuffer(data, dtype=dtype, count=count, offset=at))
        at += arrays[-1].nbytes
    extensions = data[at + key_bytes : at + key_bytes + extension_bytes]
    return ShardIndex(
        *arrays,
        keys=data[at : at + key_bytes],
        extensions=tuple(json.loads(extensions)),
        shard_bytes=shard_bytes,
        mtime_ns=mtime,
        sha256=sha.hex(),
    )
