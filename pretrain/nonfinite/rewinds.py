"""The rewinds of a run, and the sample positions that it skips because of them. RUN/passed_over.json

A rewind is recorded before any checkpoint is removed, so a run that is killed during a rewind completes it at the next
start. The order of samples is a pure function of seed, position and this list.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pretrain.core import distributed
from pretrain.core.configlib import ConfigError
from pretrain.core.files import write_json
from pretrain.engine.checkpoint.checkpoints import Checkpoints

FILE = "passed_over.json"


@dataclass(frozen=True)
class Rewind:
    """One return to an earlier checkpoint.

    Attributes:
        at, to: completed steps when it was decided, and after it (0: the start of the run).
        positions: sample positions that are skipped from then on.
        finished: later checkpoints have been removed.
    """

    at: int
    to: int
    positions: tuple[int, ...]
    finished: bool = False


class SkippedPositions:
    """The list of one run, the same on every rank. Methods are called by all ranks together."""

    def __init__(self, run_dir: Path):
        self._path = run_dir / FILE
        self.rewinds: list[Rewind] = distributed.broadcast_object(
            _read(self._path) if distributed.rank() == 0 else None
        )

    @property
    def counts(self) -> dict[int, int]:
        """How many candidates to skip at each position: a position listed twice skips its first substitute too."""
        return dict(Counter(position for rewind in self.rewinds for position in rewind.positions))

    @property
    def rewound_to_start(self) -> bool:
        """The last rewind left no checkpoint."""
        return bool(self.rewinds) and self.rewinds[-1].to == 0

    def decide(self, at: int, to: int, positions: Iterable[int]) -> None:
        """Record that the run rewinds from step `at` to step `to`."""
        self.rewinds.append(Rewind(at, to, tuple(sorted(positions))))
        self._write()

    def complete(self, checkpoints: Checkpoints) -> Rewind | None:
        """Remove the checkpoints after the last rewind, unless already done; returns that rewind, else None."""
        if not self.rewinds or self.rewinds[-1].finished:
            return None
        last = self.rewinds[-1]
        checkpoints.remove_after(last.to)
        self.rewinds[-1] = replace(last, finished=True)
        self._write()
        return last

    def _write(self) -> None:
        if distributed.rank() == 0:
            write_json(self._path, {"rewinds": [asdict(rewind) for rewind in self.rewinds]})
        distributed.barrier()


def _read(path: Path) -> list[Rewind]:
    if not path.exists():
        return []
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["rewinds"]
        return [Rewind(**{**rewind, "positions": tuple(rewind["positions"])}) for rewind in listed]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        problem = f"not a list of rewinds ({error!r}); restore it: it decides which positions the run skips"
        raise ConfigError(str(path), [problem]) from error
