"""A data set: shards and their index, checked against each other when it is opened."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from pretrain.data.sampling.mixture import MixedOrder, Mixture
from pretrain.data.sampling.order import Order
from pretrain.data.shards.catalog import CATALOG, ShardRow, fingerprint, read_rows
from pretrain.data.shards.exclusion import kept_samples
from pretrain.data.shards.listing import expand, gone_shards
from pretrain.data.shards.sidecar import sidecar_path


@dataclass(frozen=True, eq=False)
class Dataset:
    """Indexed shards in canonical order (by name, then content), so that the order of a list never changes training.

    names: file names; paths: their paths; indexes: the folder of the index of each, None if next to it; counts [S]
    int64: samples per shard; extensions: sorted, of all members; fingerprint: sha256 of the sorted shard rows and of
    what is excluded; kept: of shards with excluded samples, the numbers of the others; mixture: of several data sets,
    whose names begin those of the shards, see `mix`. Holds no open file and pickles small.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    indexes: tuple[Path | None, ...]
    rows: tuple[ShardRow, ...]
    counts: np.ndarray
    extensions: tuple[str, ...]
    fingerprint: str
    kept: Mapping[int, np.ndarray] = field(default_factory=dict)
    mixture: Mixture | None = None

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
            indexes=(folder,) * len(rows),
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

    def beside(self, shard: int) -> tuple[int, int]:
        """The first shard and the one after the last of the set that a shard is part of: all, but for a mixture."""
        if self.mixture is None:
            return 0, len(self.counts)
        number, ends = self.mixture.set_of(shard), (*self.mixture.first[1:], len(self.counts))
        return self.mixture.first[number], ends[number]

    def stored(self, shard: int, sample: int) -> int:
        """The number in the shard's index of sample `sample` of those that are not excluded."""
        return int(self.kept[shard][sample]) if shard in self.kept else sample

    def only(self, shard: int) -> Dataset:
        """The data set of one of its shards."""
        row = self.rows[shard]
        return Dataset(
            (self.names[shard],),
            (self.paths[shard],),
            (self.indexes[shard],),
            (row,),
            self.counts[shard : shard + 1],
            tuple(sorted(row.extensions)),
            fingerprint([row]),
            {0: self.kept[shard]} if shard in self.kept else {},
        )

    def sidecar(self, shard: int) -> Path:
        """The index file of a shard."""
        return sidecar_path(self.paths[shard], self.indexes[shard])

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


def mix(sets: Mapping[str, Dataset], steps: Sequence[int], shares: Sequence[Sequence[float]]) -> Dataset:
    """One data set of several, by their names; steps, shares: see `Mixture`, with a share for each of `sets`.

    Its fingerprint depends on names, contents and shares, not on the order in which the sets are given.
    """
    order = sorted(range(len(sets)), key=list(sets).__getitem__)
    names = tuple(sorted(sets))
    parts = [sets[name] for name in names]
    counts = [len(part.counts) for part in parts]
    first = tuple(int(number) for number in np.cumsum([0, *counts[:-1]]))
    mixture = Mixture(names, first, tuple(steps), tuple(tuple(row[place] for place in order) for row in shares))
    of = [(name, part.fingerprint) for name, part in zip(names, parts, strict=True)]
    identity = json.dumps([of, mixture.steps, mixture.shares]).encode()
    return Dataset(
        names=tuple(f"{name}/{file}" for name, part in zip(names, parts, strict=True) for file in part.names),
        paths=tuple(path for part in parts for path in part.paths),
        indexes=tuple(index for part in parts for index in part.indexes),
        rows=tuple(row for part in parts for row in part.rows),
        counts=np.concatenate([part.counts for part in parts]),
        extensions=tuple(sorted({extension for part in parts for extension in part.extensions})),
        fingerprint=hashlib.sha256(identity).hexdigest(),
        kept={
            start + shard: samples
            for start, part in zip(first, parts, strict=True)
            for shard, samples in part.kept.items()
        },
        mixture=mixture,
    )


def order_of(dataset: Dataset, seed: int, block_shards: int, global_batch: int) -> Order | MixedOrder:
    """The order of its samples; `global_batch` is that of the steps of a mixture."""
    if dataset.mixture is None:
        return Order(dataset.counts, seed, block_shards)
    return MixedOrder(dataset.counts, seed, block_shards, dataset.mixture, global_batch)


def _quoted(shards: str | Path | Sequence[str | Path]) -> str:
    items = [shards] if isinstance(shards, str | Path) else shards
    return " ".join(shlex.quote(str(item)) for item in items)
