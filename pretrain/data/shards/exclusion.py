"""Samples that are left out of a data set: a text file with a line SHARD/KEY for each. No shard is written again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pretrain.core.files import read_text
from pretrain.core.text import shown
from pretrain.data.shards.catalog import ShardRow
from pretrain.data.shards.sidecar import read_sidecar

TAR = ".tar"


def name_of(shard: str, key: str) -> str:
    """The line of a sample: the file name of its shard without .tar, and its key."""
    return f"{shard.removesuffix(TAR)}/{key}"


def read_names(path: Path) -> list[str]:
    """The lines of an exclusion list, without empty ones and comments (#).

    Raises:
        ValueError: it cannot be read, or a line has no slash.
    """
    try:
        lines = [line.rstrip("\n") for line in read_text(path).splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ValueError(f"{path}: cannot read this list of excluded samples: {reason}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        if "/" not in line:
            raise ValueError(
                f"{path}, line {number}: {shown(line)!r}; expected SHARD/KEY, for instance train-000000/dog1"
            )
        found.append(line)
    return found


def kept_samples(path: Path, rows: Sequence[ShardRow], sidecars: Sequence[Path]) -> tuple[dict[int, np.ndarray], str]:
    """Of shards with excluded samples, the numbers of the others [n] in order; and a hash of what is excluded.

    Raises:
        ValueError: a line names no sample of these shards, or nothing is left.
    """
    keys: dict[str, set[str]] = {}
    names = read_names(path)
    for name in names:
        shard, _, key = name.partition("/")
        keys.setdefault(shard.removesuffix(TAR), set()).add(key)
    found: dict[int, np.ndarray] = {}
    for number, (row, sidecar) in enumerate(zip(rows, sidecars, strict=True)):
        wanted = keys.pop(row.name.removesuffix(TAR), None)
        if wanted is None:
            continue
        index = read_sidecar(sidecar)
        of_shard = [index.key(sample) for sample in range(len(index))]
        if unknown := wanted - set(of_shard):
            raise _no_sample(path, name_of(row.name, min(unknown)), len(unknown))
        found[number] = np.array([n for n, key in enumerate(of_shard) if key not in wanted], dtype=np.int64)
    if keys:
        shard = min(keys)
        raise _no_sample(path, name_of(shard, min(keys[shard])), sum(map(len, keys.values())))
    if not sum(len(found[n]) if n in found else row.count for n, row in enumerate(rows)):
        raise ValueError(f"{path}: excludes every sample of the data set")
    return found, hashlib.sha256("\n".join(sorted(set(names))).encode()).hexdigest()


def _no_sample(path: Path, name: str, count: int) -> ValueError:
    more = f" and {count - 1} more lines name" if count > 1 else " names"
    return ValueError(f"{path}: {shown(name)}{more} no sample of these shards; is the list of another data set?")
