"""A data set: shards and their index, checked against each other when it is opened."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from pretrain.data.shards.catalog import CATALOG, ShardRow, fingerprint, read_rows
from pretrain.data.shards.listing import expand, gone_shards
from pretrain.data.shards.sidecar import sidecar_path


@dataclass(frozen=True, eq=False)
class Dataset:
    """Indexed shards in canonical order (by name, then content), so that the order of a list never changes training.

    names: file names; paths: their paths; index: the folder of their index, None if next to them; counts [S] int64:
    samples per shard; extensions: sorted, of all members; fingerprint: sha256 of the sorted shard rows. Holds no open
    file and pickles small.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    index: Path | None
    rows: tuple[ShardRow, ...]
    counts: np.ndarray
    extensions: tuple[str, ...]
    fingerprint: str

    @staticmethod
    def open(shards: str | Path | Sequence[str | Path], index: str | Path | None = None) -> Dataset:
        """Open shards (a folder, glob, brace range or list) with their index, next to them or in the folder `index`.

        ValueError: empty list, missing shard, no index (with the command that makes it), a shard whose size differs
        from its index, a missing shard of the index, a damaged index, no sample at all, a name that is not a
        local path.
        """
        paths = expand(shards)
        folder = None if index is None else Path(index)
        command = f"fovea data index {_quoted(shards)}" + (f" --out {shlex.quote(str(index))}" if index else "")
        catalogs: dict[Path, dict[str, ShardRow]] = {}
        found: list[tuple[ShardRow, str]] = []
        missing: list[str] = []
        changed: list[str] = []
        for path in paths:
            home = sidecar_path(path, folder).parent
            if home not in catalogs:
                catalogs[home] = read_rows(home)
            row = catalogs[home].get(Path(path).name)
            if row is None:
                missing.append(path)
                continue
            size = Path(path).stat().st_size
            if size != row.bytes:
                changed.append(f"{path} has {size} bytes, its index has {row.bytes}")
            found.append((row, path))
        if missing:
            listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise ValueError(f"not in an index ({CATALOG}): {listed}; make it with: {command}")
        if changed:
            listed = "\n  ".join(changed[:20])
            raise ValueError(
                f"truncated or replaced shards; restore them, or index them again with: {command}\n  {listed}"
            )
        if index is None and (gone := gone_shards(shards, paths, catalogs)):
            listed = ", ".join(gone[:3]) + (f" and {len(gone) - 3} more" if len(gone) > 3 else "")
            raise ValueError(
                f"in the index ({CATALOG}), but missing: {listed}; restore them, or remove them from the index "
                f"with: {command} --forget"
            )
        found.sort()
        rows = tuple(row for row, _ in found)
        counts = np.array([row.count for row in rows], dtype=np.int64)
        if not counts.sum():
            raise ValueError(f"no sample in {len(paths)} shards: {paths[0]} ...")
        return Dataset(
            names=tuple(row.name for row in rows),
            paths=tuple(path for _, path in found),
            index=folder,
            rows=rows,
            counts=counts,
            extensions=tuple(sorted({extension for row in rows for extension in row.extensions})),
            fingerprint=fingerprint(rows),
        )

    def only(self, shard: int) -> Dataset:
        """The data set of one of its shards."""
        row = self.rows[shard]
        return Dataset(
            (self.names[shard],),
            (self.paths[shard],),
            self.index,
            (row,),
            self.counts[shard : shard + 1],
            tuple(sorted(row.extensions)),
            fingerprint([row]),
        )

    def sidecar(self, shard: int) -> Path:
        """The index file of a shard."""
        return sidecar_path(self.paths[shard], self.index)

    @property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return int(self.counts.sum())

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.counts)

    def locate(self, number: int) -> tuple[int, int]:
        """(shard, sample within it) of sample `number` in canonical order, 0 <= number < num_samples."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - int(self._ends[shard]) + int(self.counts[shard])


def _quoted(shards: str | Path | Sequence[str | Path]) -> str:
    items = [shards] if isinstance(shards, str | Path) else shards
    return " ".join(shlex.quote(str(item)) for item in items)
