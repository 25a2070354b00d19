"""A data set: shards and their index, checked against each other when it is opened."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from pretrain.data.shards.catalog import CATALOG, ShardRow, fingerprint, read_rows
from pretrain.data.shards.exclusion import kept_samples
from pretrain.data.shards.listing import expand, gone_shards
from pretrain.data.shards.sidecar import sidecar_path


@dataclass(frozen=True, eq=False)
class Dataset:
    """Indexed shards in canonical order (by name, then content), so that the order of a list never changes training.

    names: file names; paths: their paths; index: the folder of their index, None if next to them; counts [S] int64:
    samples per shard; extensions: sorted, of all members; fingerprint: sha256 of the sorted shard rows and of what is
    excluded; kept: of shards with excluded samples, the numbers of the others. Holds no open file and pickles small.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    index: Path | None
    rows: tuple[ShardRow, ...]
    counts: np.ndarray
    extensions: tuple[str, ...]
    fingerprint: str
    kept: Mapping[int, np.ndarray] = field(default_factory=dict)

    @staticmethod
    def open(
        shards: str | Path | Sequence[str | Path],
        index: str | Path | None = None,
        *,
        exclude: str | Path | None = None,
    ) -> Dataset:
        """Open shards (a folder, glob, brace range or list) with their index, next to them or in the folder `index`.

        exclude: a list of samples to leave out, see `exclusion`.

        ValueError: empty list, missing shard, no index (with the command that makes it), a shard whose size differs
        from its index, a missing shard of the index, a damaged index, no sample at all, a name that is not a
        local path, a list that names other samples.
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
        every = Dataset(
            names=tuple(row.name for row in rows),
            paths=tuple(path for _, path in found),
            index=folder,
            rows=rows,
            counts=counts,
            extensions=tuple(sorted({extension for row in rows for extension in row.extensions})),
            fingerprint=fingerprint(rows),
        )
        return every if exclude is None else every.without(Path(exclude))

    def without(self, exclude: Path) -> Dataset:
        """The data set without the samples that the file names, see `exclusion`; ValueError for a wrong list."""
        kept, names = kept_samples(exclude, self.rows, [self.sidecar(shard) for shard in range(len(self.rows))])
        counts = self.counts.copy()
        for shard, samples in kept.items():
            counts[shard] = len(samples)
        identity = hashlib.sha256(f"{self.fingerprint} without {names}".encode()).hexdigest()
        return replace(self, counts=counts, fingerprint=identity, kept=kept)

    def stored(self, shard: int, sample: int) -> int:
        """The number in the shard's index of sample `sample` of those that are not excluded."""
        return int(self.kept[shard][sample]) if shard in self.kept else sample

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
            {0: self.kept[shard]} if shard in self.kept else {},
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
