"""The rows of a run that the doctor keeps: the first and the last ones, by step. No torch here."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from statistics import median

FIRST, LAST = 10, 512


@dataclass(frozen=True)
class Facts:
    """Properties of a run that diagnoses depend on.

    Attributes:
        total_steps, warmup_steps, peak_lr: of the optimizer.
        prototypes: K of the class token's head, or of the clusters, if the teacher assigns images or patches to them.
        centred: an average over past batches is subtracted from the teacher's logits.
        rows: number of assignments or features per micro-batch, over which statistics are computed.
        embed_dim: width of the features.
        still_steps: the first steps, in which the momentum of an average falls from 1.
    """

    total_steps: int
    warmup_steps: int
    peak_lr: float
    prototypes: int | None = None
    centred: bool = False
    rows: int = 1
    embed_dim: int = 1
    still_steps: int = 0


class History:
    """Rows of values by name, in order of step; a row may lack values.

    Attributes:
        first: the first values of each name. most, least: maximum and minimum of all values.
    """

    def __init__(self) -> None:
        self.first: dict[str, list[float]] = {}
        self.most: dict[str, float] = {}
        self.least: dict[str, float] = {}
        self._last: deque[tuple[int, Mapping[str, float]]] = deque(maxlen=LAST)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self._last.append((step, dict(values)))
        for name, value in values.items():
            self.most[name] = max(value, self.most.get(name, value))
            self.least[name] = min(value, self.least.get(name, value))
            known = self.first.setdefault(name, [])
            if len(known) < FIRST:
                known.append(value)

    @property
    def step(self) -> int:
        return self._last[-1][0]

    @property
    def now(self) -> Mapping[str, float]:
        return self._last[-1][1]

    def back(self, name: str) -> Iterator[tuple[int, float]]:
        """(step, value) of the rows that have `name`, newest first."""
        return ((step, row[name]) for step, row in reversed(self._last) if name in row)

    def recent(self, name: str, count: int) -> list[float]:
        """The last `count` values, newest first."""
        return [value for _, value in islice(self.back(name), count)]

    def middle(self, name: str, count: int) -> float:
        """Median of the last `count` values; nan while there are fewer."""
        values = self.recent(name, count)
        return median(values) if len(values) == count else float("nan")
