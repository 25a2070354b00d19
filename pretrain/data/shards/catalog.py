"""`dataset.json`: one row per shard of a folder, all that the order of training needs to know of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pretrain.core.files import write_whole

CATALOG = "dataset.json"
_VERSION = 1


class Row(NamedTuple):
    """A shard: file name, size in bytes, sha256 in hex, number of samples, extensions of its members."""

    name: str
    bytes: int
    sha256: str
    count: int
    extensions: tuple[str, ...]


def fingerprint(rows: Iterable[Row]) -> str:
    """sha256 of the sorted rows (name, bytes, sha256, count): a data set's identity, in whatever order it is listed."""
    lines = sorted(f"{row.name} {row.bytes} {row.sha256} {row.count}\n" for row in rows)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_rows(folder: Path) -> dict[str, Row]:
    """The rows of `folder/dataset.json` by shard name; empty where there is none. ValueError when it is damaged."""
    path = folder / CATALOG
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ValueError(f"{path}: cannot read this index: {error.strerror}") from error
    try:
        content = json.loads(text)
        version, recorded = content["version"], content["fingerprint"]
        rows = [Row(**{**row, "extensions": tuple(row["extensions"])}) for row in content["shards"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged, or not a dataset.json; delete it and run fovea data index again") from error
    if version != _VERSION:
        raise ValueError(f"{path}: version {version}, and this program reads {_VERSION}; index the shards again")
    if recorded != fingerprint(rows):
        raise ValueError(f"{path}: its rows do not match its fingerprint; delete it and run fovea data index again")
    return {row.name: row for row in rows}


def update_rows(folder: Path, rows: Iterable[Row]) -> None:
    """Add or replace `rows` in `folder/dataset.json`; rows of other shards of the folder stay."""
    known = read_rows(folder) | {row.name: row for row in rows}
    ordered = [known[name] for name in sorted(known)]
    lines = ",\n".join(json.dumps(row._asdict()) for row in ordered)
    head = f'{{"version": {_VERSION}, "fingerprint": "{fingerprint(ordered)}", "shards": ['
    write_whole(folder / CATALOG, f"{head}\n{lines}\n]}}\n".encode())
