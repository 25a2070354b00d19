"""Paired differences over seeds: the mean with its interval, and what may be claimed from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences with its 95 % interval by Student's t.

    Attributes:
        low, high: not finite with one pair. pairs: how many.
    """

    mean: float
    low: float
    high: float
    pairs: int

    @property
    def verdict(self) -> str:
        """Something is claimed only where the interval of 3 pairs or more excludes 0.

        Accuracies of a few hundred images are steps: two differences can be equal, which gives an interval of width 0.
        """
        if self.pairs < 3:
            return "no difference seen"
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no difference seen"


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Of ours - theirs, pair by pair.

    Raises:
        ValueError: the numbers of values differ, or there are none.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"{len(ours)} and {len(theirs)} values are no pairs")
    differences = np.asarray(ours, float) - np.asarray(theirs, float)
    mean, count = float(differences.mean()), len(differences)
    if count == 1:
        return Difference(mean, -np.inf, np.inf, count)
    half = float(t.ppf(0.975, count - 1) * differences.std(ddof=1) / np.sqrt(count))
    return Difference(mean, mean - half, mean + half, count)
