"""Samples that cannot be used: each is replaced, counted and listed; too many stop the run.

A replacement takes the sample's position, so later positions and batch sizes do not change. The replacement is keyed by
the position: the same on any rank of any world size.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

import numpy as np

from pretrain.data.sampling import keyed

MAX_SUBSTITUTES = 8


class BadRecord(TypedDict):
    """One sample that was not used. `substitute` is "shard/key" of the sample that took the position.

    `passed_over`: it is readable, but its position is on the run's list of skipped positions.
    """

    position: int
    shard: str
    key: str
    reason: str
    substitute: str
    passed_over: bool


class TooManyBadSamplesError(ValueError):
    """More bad samples than the run may replace."""


def candidates(
    counts: np.ndarray, seed: int, position: int, own: tuple[int, int], *, within: tuple[int, int] | None = None
) -> Iterator[tuple[int, int]]:
    """(shard, sample) of at most MAX_SUBSTITUTES replacements for `own` at `position`, uniform over all others.

    within: the first shard and the one after the last that replace it; default: all.
    """
    first, end = within or (0, len(counts))
    counts, own = counts[first:end], (own[0] - first, own[1])
    ends = np.cumsum(counts)
    others, own_index = int(ends[-1]) - 1, int(ends[own[0]] - counts[own[0]]) + own[1]
    for attempt in range(MAX_SUBSTITUTES if others else 0):
        index = int(keyed.generator(seed, position, keyed.SUBSTITUTE, attempt).random() * others)
        index += index >= own_index
        shard = int(np.searchsorted(ends, index, side="right"))
        yield first + shard, index - int(ends[shard] - counts[shard])


class BadSamples:
    """Counts the bad samples that the batches of this rank report. Skipped positions are listed, not counted.

    max_bad_fraction  of all reads, checked after `min_seen` samples, plus three standard deviations, because each of
                      many ranks checks its own small share. A data set with only bad samples stops earlier, in the
                      worker that finds no substitute
    record            called once per new bad (shard, key), for instance to append a line to bad_samples.jsonl
    known             (shard, key) pairs recorded before, by an earlier attempt of the same run
    """

    def __init__(
        self,
        max_bad_fraction: float,
        *,
        record: Callable[[BadRecord], None] | None = None,
        known: Iterable[tuple[str, str]] = (),
        min_seen: int = 100,
    ) -> None:
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction must be in [0, 1], got {max_bad_fraction}")
        self.max_bad_fraction = max_bad_fraction
        self.num_seen = 0
        self.num_bad = 0
        self._record = record
        self._known = set(known)
        self._min_seen = min_seen

    def observe(self, num_samples: int, bad: list[BadRecord]) -> None:
        """Count one batch; raises TooManyBadSamplesError."""
        for record in bad:
            if (record["shard"], record["key"]) not in self._known:
                self._known.add((record["shard"], record["key"]))
                if self._record is not None:
                    self._record(record)
        self.num_seen += num_samples
        bad = [record for record in bad if not record["passed_over"]]
        self.num_bad += len(bad)
        reads = self.num_seen + self.num_bad
        allowed = self.max_bad_fraction * reads
        if self.num_seen >= self._min_seen and self.num_bad > allowed + 3 * math.sqrt(allowed):
            last = bad[-1] if bad else None
            example = f"; the last: {last['shard']}/{last['key']}: {last['reason']}" if last else ""
            raise TooManyBadSamplesError(
                f"{self.num_bad} of {reads} reads were bad samples, more than max_bad_fraction={self.max_bad_fraction}"
                f"{example}. Check the shards (`fovea data verify` finds bytes that changed since they were indexed, "
                "`fovea data show` finds images that were never readable), or raise the limit."
            )


class BadList:
    """The file of one rank's bad samples, continued at each start of a run."""

    def __init__(self, run_dir: Path, *, rank: int, say: Callable[[str], None]):
        self._path, self._say = run_dir / f"bad_samples.rank{rank}.jsonl", say

    def known(self) -> set[tuple[str, str]]:
        """(shard, key) of the samples listed by earlier starts; an incomplete last line is removed from the file."""
        if not self._path.exists():
            return set()
        data = self._path.read_bytes()
        complete = data[: data.rfind(b"\n") + 1]
        if complete != data:  # or the next record would be on the same line
            os.truncate(self._path, len(complete))
        found: set[tuple[str, str]] = set()
        for line in complete.splitlines():
            with suppress(ValueError, KeyError, TypeError):  # a damaged line: its sample is listed again
                record = json.loads(line)
                found.add((record["shard"], record["key"]))
        return found

    def add(self, record: BadRecord) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        where = f"{record['shard']}/{record['key']}"
        self._say(f"bad sample {where}: {record['reason']}; used {record['substitute']} instead")
