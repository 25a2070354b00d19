"""Index shards: one sequential pass over each, grouping members into samples by webdataset's rule.

What webdataset would silently merge, split or drop (interleaved keys, duplicates, a truncated tail) is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from pretrain.data.shards.catalog import ShardRow, update_rows
from pretrain.data.shards.keys import KeyRule, hidden_images, split_name
from pretrain.data.shards.opener import open_shard
from pretrain.data.shards.parallel import run_parallel
from pretrain.data.shards.sidecar import ShardIndex, read_sidecar, sidecar_path, write_sidecar
from pretrain.data.shards.tar import Member, TarError, Walker

_RULE = (
    "a sample's key ends at the first dot of a name, and the rest is the member's extension; rename the members, or "
    "index with --key-rule last-dot (first-dot accepts them as they are)"
)
_RESERVED = {"__key__", "__url__", "__local_path__", "__bad__"}  # keys that a webdataset sample dict already has


def build_index(
    shards: Sequence[str],
    *,
    out: Path | None = None,
    workers: int = 1,
    force: bool = False,
    key_rule: KeyRule | None = None,
    forget: Sequence[str] = (),
    done: Callable[[ShardRow], None] = lambda row: None,
) -> list[ShardRow]:
    """Index `shards`: a sidecar next to each (or in `out`) and their rows in that folder's `dataset.json`.

    A shard whose sidecar is intact and records its size and modification time is not read again, unless `force` or
    `key_rule` (see `index_shard`) is given.
    `forget`: missing shards whose rows and sidecars are removed. `done` is called as each shard finishes. Every
    shard is tried; ValueError lists all that were refused.
    """
    _refuse_collisions(shards, out)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    for folder in {sidecar_path(shard, out).parent for shard in shards}:
        if not os.access(folder, os.W_OK):
            raise ValueError(f"{folder} is not writable; write the index elsewhere with --out DIR")
    rows: dict[str, ShardRow] = {}
    problems: dict[str, str] = {}
    index_one = partial(_index_one, out=out, force=force or key_rule is not None, key_rule=key_rule)
    for shard, result in run_parallel(index_one, shards, workers=workers):
        if isinstance(result, ShardRow):
            rows[shard] = result
            done(result)
        else:
            problems[shard] = result
    if problems:
        lines = "".join(f"\n  {problems[shard]}" for shard in shards if shard in problems)
        raise ValueError(f"{len(problems)} of {len(shards)} shards cannot be indexed:{lines}")
    folders: dict[Path, list[ShardRow]] = {}
    for shard in shards:
        folders.setdefault(sidecar_path(shard, out).parent, []).append(rows[shard])
    for folder, found in folders.items():
        gone = [Path(shard).name for shard in forget if sidecar_path(shard, out).parent == folder]
        update_rows(folder, found, remove=gone)
    for shard in forget:
        sidecar_path(shard, out).unlink(missing_ok=True)
    return [rows[shard] for shard in shards]


def _index_one(shard: str, *, out: Path | None, force: bool, key_rule: KeyRule | None) -> ShardRow | str:
    """The shard's row, or why it was refused."""
    path = sidecar_path(shard, out)
    try:
        index = None if force else _reusable(shard, path)
        if index is None:
            index = index_shard(shard, key_rule)
            write_sidecar(path, index)
        return ShardRow(Path(shard).name, index.shard_bytes, index.sha256, len(index), index.extensions)
    except TarError as error:
        return str(error)
    except (OSError, ValueError) as error:
        return f"{shard}: {error}"


def _reusable(shard: str, path: Path) -> ShardIndex | None:
    """The sidecar at `path` if it is intact and the shard has not changed since."""
    try:
        index = read_sidecar(path)
    except ValueError:
        return None
    stat = Path(shard).stat()
    return index if (stat.st_size, stat.st_mtime_ns) == (index.shard_bytes, index.mtime_ns) else None


def _refuse_collisions(shards: Sequence[str], out: Path | None) -> None:
    owner: dict[Path, str] = {}
    for shard in shards:
        path = sidecar_path(shard, out)
        if path in owner:
            raise ValueError(f"{owner[path]} and {shard} would share the index {path}; index them into two folders")
        owner[path] = shard


def index_shard(url: str, key_rule: KeyRule | None = None) -> ShardIndex:
    """Read one shard from its first byte to its last and index it. TarError (a ValueError) names shard and member.

    key_rule: how a member's name is split (`split_name`); None: at the first dot, and a shard with image members that
    this rule hides is refused.
    """
    fd = open_shard(url)
    try:
        stat = os.fstat(fd)
        walker = Walker(fd, url)
        members, keys, first, extensions = _group(walker, url, key_rule or "first-dot")
        after = os.fstat(fd)
        if (after.st_size, after.st_mtime_ns) != (walker.size, stat.st_mtime_ns):
            raise TarError(url, "", "changed while it was being indexed; index it again")
    finally:
        os.close(fd)
    names = sorted(set(extensions))
    if len(names) > 0xFFFF:
        raise TarError(url, "", f"{len(names)} different extensions: {_RULE}")
    numbers = {name: i for i, name in enumerate(names)}
    blobs = [key.encode() for key in keys]
    index = ShardIndex(
        offset=np.array([m.offset for m in members], dtype=np.uint64),
        length=np.array([m.length for m in members], dtype=np.uint32),
        crc32c=np.array([m.crc32c for m in members], dtype=np.uint32),
        first=np.array([*first, len(members)], dtype=np.uint32),
        key_end=np.cumsum([0, *map(len, blobs)], dtype=np.uint32),
        extension=np.array([numbers[extension] for extension in extensions], dtype=np.uint16),
        keys=b"".join(blobs),
        extensions=tuple(names),
        shard_bytes=walker.size,
        mtime_ns=stat.st_mtime_ns,
        sha256=walker.sha256.hex(),
    )
    if key_rule is None and (hidden := hidden_images(index)):
        raise TarError(url, hidden[0], f"{len(hidden)} images are hidden by dots in their names: {_RULE}")
    return index


def _group(
    walk: Iterable[Member], shard: str, key_rule: KeyRule = "first-dot"
) -> tuple[list[Member], list[str], list[int], list[str]]:
    """Members, sample keys, each sample's first member, each member's extension."""
    members: list[Member] = []
    keys: list[str] = []
    first: list[int] = []
    extensions: list[str] = []
    seen: set[str] = set()
    here: set[str] = set()
    for member in walk:
        parts = split_name(member.name, key_rule)
        if parts is None:
            continue
        key, extension = parts
        if extension in _RESERVED:
            raise TarError(shard, member.name, f"extension {extension} is reserved by webdataset")
        if member.length > 0xFFFFFFFF:
            raise TarError(shard, member.name, f"{member.length} bytes; a member holds less than 4 GiB")
        if not keys or key != keys[-1]:
            if key in seen:
                raise TarError(
                    shard,
                    member.name,
                    "its sample's members are not together (interleaved, or a key used twice); pack it again by name, "
                    "as tar --sort=name does",
                )
            seen.add(key)
            here = set()
            keys.append(key)
            first.append(len(members))
        if extension in here:
            raise TarError(shard, member.name, "duplicate member: this sample already has this extension")
        here.add(extension)
        members.append(member)
        extensions.append(extension)
    return members, keys, first, extensions
