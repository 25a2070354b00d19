"""The order of samples of several data sets that are mixed by weights: a pure function of (seed, position).

The positions are divided into segments, in which the shares of the sets are constant, and segments into rounds. The
number of samples of each set in the first n positions of a segment is a rounded product, so a round knows what it takes
from each set and from where on, without the rounds before it. Within a round the sets are shuffled. What a set gives in
turn is the order of its own samples: all of them once in each of its epochs, which end apart from those of other sets.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pretrain.data.sampling import keyed
from pretrain.data.sampling.order import Located, Order, remember

ROUND = 1024  # positions that are shuffled together
_BITS = 40  # of a share
_ROUNDS_KEPT = 4


@dataclass(frozen=True)
class Mixture:
    """Sets of consecutive shards, and their shares by step.

    Attributes:
        names: of the sets. first: the number of the first shard of each.
        steps: optimizer steps from which on the rows of `shares` hold; the first is 0, in rising order.
        shares: [steps][sets], of the samples; a row has the sum 1.
    """

    names: tuple[str, ...]
    first: tuple[int, ...]
    steps: tuple[int, ...]
    shares: tuple[tuple[float, ...], ...]

    def set_of(self, shard: int) -> int:
        """The number of the set that a shard is part of."""
        return bisect_right(self.first, shard) - 1


class MixedOrder:
    """The samples at positions, like `order.Order`; an epoch is that of the sample's set.

    Args:
        counts: number of samples in each shard, int [num_shards], set after set.
        seed, block_shards: of the order of each set.
        global_batch: positions of a step, which the steps of the mixture are counted in.
    """

    def __init__(self, counts: np.ndarray, seed: int, block_shards: int, mixture: Mixture, global_batch: int) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.num_samples = int(self.counts.sum())
        self.seed, self.mixture, self.global_batch = seed, mixture, global_batch
        self._orders = [
            Order(part, _seed_of(seed, name), block_shards)
            for name, part in zip(mixture.names, np.split(self.counts, mixture.first[1:]), strict=True)
        ]
        self._starts = [step * global_batch for step in mixture.steps]
        self._ratios = [_ratios(shares) for shares in mixture.shares]
        self._before = [np.zeros(len(mixture.names), dtype=np.int64)]  # taken from each set before each segment
        for number, end in enumerate(self._starts[1:]):
            self._before.append(self._before[-1] + _taken(self._ratios[number], end - self._starts[number]))
        self._rounds: OrderedDict[int, _Round] = OrderedDict()

    def at_many(self, positions: np.ndarray) -> Located:
        """The samples at int64 [n] positions; fast when they are close to each other."""
        sets, turns = self.turns(positions)
        epochs, shards, samples = (np.empty_like(turns) for _ in range(3))
        for number in np.unique(sets):
            chosen = np.flatnonzero(sets == number)
            own = self._orders[number].at_many(turns[chosen])
            epochs[chosen], samples[chosen] = own.epoch, own.sample
            shards[chosen] = own.shard + self.mixture.first[number]
        return Located(epochs, shards, samples)

    def turns(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of positions, int64 [n], the number of the set and the position within its order."""
        positions = np.asarray(positions, dtype=np.int64)
        if len(positions) and positions.min() < 0:
            raise ValueError(f"position must be >= 0, got {positions.min()}")
        segments = np.searchsorted(self._starts, positions, side="right") - 1
        offsets = positions - np.asarray(self._starts)[segments]
        firsts = positions - offsets % ROUND
        sets, turns = np.empty_like(positions), np.empty_like(positions)
        for first in np.unique(firsts):
            chosen = np.flatnonzero(firsts == first)
            sets[chosen], turns[chosen] = self._round(int(first)).at(positions[chosen] - first)
        return sets, turns

    def taken(self, position: int) -> list[int]:
        """How many of the samples before a position are of each set."""
        segment = self._segment(position)
        return (self._before[segment] + _taken(self._ratios[segment], position - self._starts[segment])).tolist()

    def described(self, positions: int) -> list[str]:
        """A line for each set: its part of the first `positions` samples."""
        taken, sizes = self.taken(positions), [order.num_samples for order in self._orders]
        width = max(map(len, self.mixture.names))
        return [
            f"mixture    {name:<{width}}  {count / max(positions, 1):6.2%} of the samples, {count / size:.2f} epochs "
            f"of its {size}"
            for name, count, size in zip(self.mixture.names, taken, sizes, strict=True)
        ]

    def _segment(self, position: int) -> int:
        return bisect_right(self._starts, position) - 1

    def _round(self, first: int) -> _Round:
        if first not in self._rounds:
            segment = self._segment(first)
            following = self._starts[segment + 1 : segment + 2]
            length = min([ROUND, *(start - first for start in following)])
            ratios, offset = self._ratios[segment], first - self._starts[segment]
            before = _taken(ratios, offset)
            made = _Round(
                self._before[segment] + before,
                np.cumsum(_taken(ratios, offset + length) - before),
                keyed.permutation(self.seed, first, keyed.MIXTURE_ORDER, length=length),
            )
            remember(self._rounds, first, made, most=_ROUNDS_KEPT)
        return self._rounds[first]


class _Round(NamedTuple):
    before: np.ndarray  # samples of each set before this round
    ends: np.ndarray  # of this round, up to and with each set
    slots: np.ndarray  # a permutation of the round

    def at(self, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        slots = self.slots[offsets]
        sets = np.searchsorted(self.ends, slots, side="right")
        starts = np.concatenate([[0], self.ends[:-1]])
        return sets, self.before[sets] + slots - starts[sets]


def _ratios(shares: Sequence[float]) -> list[int]:
    """Of each set, its part of what is left by those before it, times 2 ** 40: exact on every machine."""
    left = [sum(shares[number:]) for number in range(len(shares))]
    last = max(number for number, share in enumerate(shares) if share > 0)
    return [
        1 << _BITS if number == last else round(share / rest * (1 << _BITS)) if rest > 0 else 0
        for number, (share, rest) in enumerate(zip(shares, left, strict=True))
    ]


def _taken(ratios: Sequence[int], positions: int) -> np.ndarray:
    """How many of the first `positions` of a segment are of each set, int64 [sets]; it never falls as they grow.

    A set takes its part, rounded down, of what the sets before it leave. One position more is therefore one sample more
    of exactly one set, and no set is further from its part than there are sets.
    """
    found, left = [], positions
    for ratio in ratios:
        found.append(left * ratio >> _BITS)
        left -= found[-1]
    return np.array(found, dtype=np.int64)


def _seed_of(seed: int, name: str) -> int:
    """Depends on the name of a set, not on the sets beside it."""
    return int(keyed.generator(seed, zlib.crc32(name.encode()), keyed.MIXTURE_SET).bit_generator.random_raw())
