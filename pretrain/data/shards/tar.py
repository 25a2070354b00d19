"""A strict, sequential tar walker for WebDataset shards.

Formats: POSIX.1-2001 (ustar, pax: IEEE Std 1003.1, "pax Interchange Format") and GNU tar's long names and base-256
numbers. A shard must be nothing but regular files (and folders) from its first byte to its end-of-archive blocks:
whatever a lenient reader would skip, merge or stop at is an error here, because it would be a silently lost sample.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import google_crc32c
import numpy as np

from pretrain.core.text import shown

BLOCK = 512
_CHUNK = 1 << 18
_MAX_EXTENSION = 1 << 20  # a longer pax or long-name header is an attack or damage, not a name
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
_REFUSED = {
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "character device",
    b"4": "block device",
    b"6": "named pipe",
    b"K": "long link name",
    b"S": "sparse file",
}


class TarError(ValueError):
    """A shard is not a plain tar; with the shard, the member and the reason."""

    def __init__(self, shard: str, member: str, reason: str) -> None:
        super().__init__(shown(f"{shard}: {member}: {reason}" if member else f"{shard}: {reason}"))
        self.shard, self.member, self.reason = shard, member, reason

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.shard, self.member, self.reason)


class Member(NamedTuple):
    """A regular file of a shard: `offset` and `length` in bytes of its payload, and its `crc32c`."""

    name: str
    offset: int
    length: int
    crc32c: int


class Walker:
    """One pass over an open shard: iterate the members, then read `sha256` and `size` of the complete file."""

    def __init__(self, fd: int, shard: str) -> None:
        self.shard = shard
        self.size = 0
        self._fd = fd
        self._sha = hashlib.sha256()
        self._member = ""
        self._buffer = memoryview(bytearray(_CHUNK))
        # google_crc32c takes only a read-only array without a copy
        self._view = np.frombuffer(self._buffer.toreadonly(), dtype=np.uint8)

    @property
    def sha256(self) -> bytes:
        """Of every byte read so far; of the complete shard after the iteration."""
        return self._sha.digest()

    def __iter__(self) -> Iterator[Member]:
        pax: dict[str, bytes] = {}
        long_name: bytes | None = None
        while True:
            block = self._read(BLOCK, "the next header (there are no end-of-archive blocks)")
            if block.count(0) == BLOCK:
                if pax or long_name is not None:
                    raise self._error("extended header without a member after it")
                return self._end()
            kind = self._check(block)
            size = self._number(block[124:136], "size")
            if kind in b"xgL":
                record = self._extension(kind, size)
                if kind == b"L":
                    long_name = record.rstrip(b"\0")
                elif kind == b"x":
                    pax = self._pax_records(record)
                else:
                    self._refuse_global(self._pax_records(record))
                continue
            raw = pax.get("path", long_name if long_name is not None else _header_name(block))
            name = self._member = self._safe_name(raw)
            if "size" in pax:
                size = self._pax_size(pax["size"])
            sparse = next((key for key in pax if key.startswith("GNU.sparse")), None)
            if sparse or kind in _REFUSED:
                raise self._error(f"{'sparse file' if sparse else _REFUSED[kind]}; a shard holds regular files only")
            folder = kind == b"5" or (kind == b"\0" and name.endswith("/"))
            if folder and size:
                raise self._error(f"folder with {size} bytes of data")
            if not folder and kind not in b"07\0":
                raise self._error(f"unknown member type {kind!r}; a shard holds regular files only")
            pax, long_name = {}, None
            if not folder:
                offset = self.size
                yield Member(name, offset, size, self._payload(size))

    def _read(self, count: int, what: str) -> bytes:
        """Exactly `count` bytes from the current position, hashed."""
        data = os.pread(self._fd, count, self.size)
        while len(data) < count:
            more = os.pread(self._fd, count - len(data), self.size + len(data))
            if not more:
                raise self._error(f"truncated: the file ends at byte {self.size + len(data)}, inside {what}")
            data += more
        self._sha.update(data)
        self.size += count
        return data

    def _payload(self, size: int) -> int:
        """Walk over `size` bytes of payload and its padding; the payload's crc32c."""
        crc = 0
        left, padded = size, -(-size // BLOCK) * BLOCK
        while padded:
            got = os.preadv(self._fd, [self._buffer[:padded]], self.size)
            if not got:
                raise self._error(f"truncated: the file ends at byte {self.size}, inside its payload of {size} bytes")
            self._sha.update(self._buffer[:got])
            if left > 0:
                crc = google_crc32c.extend(crc, self._view[: min(left, got)])  # type: ignore[arg-type]
            left -= got
            padded -= got
            self.size += got
        return crc

    def _end(self) -> None:
        """After one zero block: a second one, then only zeros up to a multiple of the block size."""
        second = os.pread(self._fd, BLOCK, self.size)
        if len(second) == BLOCK and any(second):
            raise self._error("a lone zero block inside the archive, then more data")
        self._read(BLOCK, "the end-of-archive blocks")
        while data := os.pread(self._fd, _CHUNK, self.size):
            self._sha.update(data)
            self.size += len(data)
            if data.count(0) != len(data):
                raise self._error("data after the end of the archive: concatenated archives are not supported")
        if self.size % BLOCK:
            raise self._error(f"truncated: {self.size} bytes are not a multiple of {BLOCK}-byte blocks")

    def _check(self, block: bytes) -> bytes:
        """Verify the header checksum; the member's type."""
        stored = block[148:156].strip(b" \0")
        total = sum(block) - sum(block[148:156]) + 8 * 32
        if not stored or any(c not in b"01234567" for c in stored) or int(stored, 8) != total:
            if self.size == BLOCK:
                for magic, name in _COMPRESSED.items():
                    if block.startswith(magic):
                        raise self._error(f"compressed with {name}; decompress it (samples are read at random)")
                raise self._error("not a tar: the first header has a bad checksum")
            raise self._error(f"bad header checksum at byte {self.size - BLOCK}, after this member")
        return block[156:157]

    def _number(self, field: bytes, what: str) -> int:
        if field[0] & 0x80:
            value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
            if field[0] & 0x40 or value >= 1 << 62:
                raise self._error(f"header after this member: {what} is negative or too large")
            return value
        digits = field.strip(b" \0")
        if any(c not in b"01234567" for c in digits):
            raise self._error(f"header after this member: {what} is not octal: {field!r}")
        return int(digits or b"0", 8)

    def _extension(self, kind: bytes, size: int) -> bytes:
        if size > _MAX_EXTENSION:
            raise self._error(f"extended header of {size} bytes (type {kind.decode()}), more than {_MAX_EXTENSION}")
        return self._read(-(-size // BLOCK) * BLOCK, "an extended header")[:size]

    def _pax_records(self, data: bytes) -> dict[str, bytes]:
        """Records are `b"<length> <keyword>=<value>\\n"`, the length counting itself."""
        records: dict[str, bytes] = {}
        at = 0
        while at < len(data):
            digits, space, _ = data[at : at + 20].partition(b" ")
            length = int(digits) if space and digits.isdigit() else 0
            record = data[at : at + length]
            keyword, equals, value = record[len(digits) + 1 : -1].partition(b"=")
            if len(record) != length or not equals or record[-1:] != b"\n":
                raise self._error(f"malformed pax header before byte {self.size}, after this member")
            records[keyword.decode("utf-8", "replace")] = value
            at += length
        return records

    def _refuse_global(self, records: dict[str, bytes]) -> None:
        bad = sorted(key for key in records if key in ("path", "size", "linkpath") or key.startswith("GNU.sparse"))
        if bad:
            raise self._error(f"global pax header sets {', '.join(bad)} for every member after this one")

    def _pax_size(self, value: bytes) -> int:
        if not value.isdigit() or len(value) > 18:
            raise self._error(f"pax size is not a number: {value!r}")
        return int(value)

    def _safe_name(self, raw: bytes) -> str:
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._error(f"the next member's name is not UTF-8: {raw!r}") from error
        reason = ""
        if not name:
            reason = "has an empty name"
        elif "\0" in name:
            reason = "has a NUL byte in its name"
        elif name.startswith("/"):
            reason = "has an absolute name"
        elif ".." in name.split("/"):
            reason = "has '..' in its name"
        if reason:
            raise TarError(self.shard, repr(name), f"member {reason}")
        return name

    def _error(self, reason: str) -> TarError:
        return TarError(self.shard, self._member, reason)


def _header_name(block: bytes) -> bytes:
    name = block[:100].rstrip(b"\0")
    prefix = block[345:500].rstrip(b"\0") if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name
