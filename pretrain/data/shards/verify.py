"""Read every byte of the shards again and name what has changed since it was indexed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import google_crc32c

from pretrain.core.text import shown
from pretrain.data.shards.catalog import CATALOG, ShardRow, read_rows
from pretrain.data.shards.listing import gone_shards
from pretrain.data.shards.opener import open_shard
from pretrain.data.shards.parallel import run_parallel
from pretrain.data.shards.sidecar import ShardIndex, read_sidecar, sidecar_path
from pretrain.data.shards.tar import BLOCK, TarError, Walker

_CHUNK = 4 << 20


@dataclass(frozen=True)
class Damage:
    """One damage; key and member are empty if it is not in a sample's payload."""

    shard: str
    key: str
    member: str
    reason: str

    def __str__(self) -> str:
        place = f", sample {self.key}" if self.key else ""
        return shown(f"{self.shard}{place}{f', member {self.member}' if self.member else ''}: {self.reason}")


@dataclass(frozen=True)
class VerifyReport:
    """Samples and bytes of one shard by its index, and the damages found."""

    samples: int
    bytes: int
    damages: list[Damage]


def verify_shards(
    shards: Sequence[str], *, spec: Sequence[str] = (), index: Path | None = None, workers: int = 1
) -> Iterator[VerifyReport]:
    """Yield a report per shard, and one for each damaged dataset.json and each missing shard: listed in
    dataset.json, but not found by the folders and globs of `spec`. ValueError if a shard was never indexed.
    """
    catalogs: dict[Path, dict[str, ShardRow] | None] = {}
    for home in {sidecar_path(shard, index).parent for shard in shards}:
        try:
            catalogs[home] = read_rows(home)
        except ValueError as error:
            catalogs[home] = None
            yield VerifyReport(0, 0, [Damage(str(home / CATALOG), "", "", str(error))])
    listed = {home: rows for home, rows in catalogs.items() if rows is not None and index is None}
    for shard in gone_shards(spec, shards, listed):
        yield VerifyReport(0, 0, [Damage(shard, "", "", f"missing, but listed in {CATALOG}")])
    never = []
    jobs: list[tuple[str, ShardRow | None]] = []
    for shard in shards:
        catalog = catalogs[sidecar_path(shard, index).parent]
        row = None if catalog is None else catalog.get(Path(shard).name)
        if catalog is not None and row is None:
            never.append(shard)
        jobs.append((shard, row))
    if never:
        raise ValueError(f"{len(never)} shards are not indexed, run fovea data index on them: {', '.join(never[:5])}")
    for _, report in run_parallel(partial(_verify, folder=index), jobs, workers=workers):
        yield report


def _verify(job: tuple[str, ShardRow | None], *, folder: Path | None) -> VerifyReport:
    shard, row = job
    path = sidecar_path(shard, folder)
    try:
        index = read_sidecar(path)
    except ValueError as error:
        return VerifyReport(0, 0, [Damage(str(path), "", "", str(error))])
    damages: list[Damage] = []
    if row is not None and (row.bytes, row.sha256, row.count) != (index.shard_bytes, index.sha256, len(index)):
        damages.append(Damage(str(path), "", "", f"not of the {row.name} in {CATALOG}; run fovea data index --force"))
    try:
        fd = open_shard(shard)
    except ValueError as error:
        return VerifyReport(
            len(index), index.shard_bytes, [*damages, Damage(shard, "", "", str(error).removeprefix(f"{shard}: "))]
        )
    try:
        damages += _compare(fd, shard, index)
    except OSError as error:
        damages.append(Damage(shard, "", "", f"cannot be read: {error.strerror}"))
    finally:
        os.close(fd)
    return VerifyReport(len(index), index.shard_bytes, damages)


def _compare(fd: int, shard: str, index: ShardIndex) -> list[Damage]:
    damages: list[Damage] = []
    size = os.fstat(fd).st_size
    if size != index.shard_bytes:
        damages.append(Damage(shard, "", "", f"{size} bytes, indexed with {index.shard_bytes}"))
    sha = hashlib.sha256()
    at = 0
    for member, (offset, length) in enumerate(zip(index.offset.tolist(), index.length.tolist(), strict=True)):
        if offset + length > size:
            lost = len(index.offset) - member
            reason = f"missing: the shard ends at byte {size}; {lost} members are lost, starting with this one"
            return [*damages, Damage(shard, *_place(index, member), reason)]
        _hash_bytes(fd, at, offset, sha)
        if _hash_bytes(fd, offset, offset + length, sha) != index.crc32c[member]:
            damages.append(Damage(shard, *_place(index, member), "crc32c mismatch"))
        at = offset + length
    _hash_bytes(fd, at, size, sha)
    if not damages and sha.hexdigest() != index.sha256:
        damages.append(_outside_payloads(fd, shard, index))
    return damages


def _hash_bytes(fd: int, start: int, end: int, sha: hashlib._Hash) -> int:
    """Hash bytes [start, end); their crc32c."""
    crc = 0
    while start < end:
        data = os.pread(fd, min(_CHUNK, end - start), start)
        if not data:
            break
        sha.update(data)
        crc = google_crc32c.extend(crc, data)
        start += len(data)
    return crc


def _outside_payloads(fd: int, shard: str, index: ShardIndex) -> Damage:
    """The shard's sha256 is wrong and every payload is right: name the header or padding, as far as possible."""
    try:
        for member in Walker(fd, shard):
            padding = os.pread(fd, -member.length % BLOCK, member.offset + member.length)
            if any(padding):
                return Damage(shard, "", member.name, "sha256 mismatch; the padding after this member is not zero")
    except TarError as error:
        return Damage(shard, "", error.member, f"sha256 mismatch; {error.reason}")
    return Damage(shard, "", "", "sha256 mismatch, though every member's payload is right: a header was rewritten")


def _place(index: ShardIndex, member: int) -> tuple[str, str]:
    """(key, extension) of a member."""
    sample = int(index.first.searchsorted(member, side="right")) - 1
    return index.key(sample), index.extensions[index.extension[member]]
