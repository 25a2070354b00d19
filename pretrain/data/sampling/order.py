"""The order of samples: a pure function of (seed, position), without state.

Positions count samples from the start of training and run across epochs: epoch = position // num_samples. Within an
epoch the shards are permuted, cut into blocks of `block_shards`, and the samples of a block are shuffled together, so
that only a few shards are read at any time. Global batch s is positions [s * B, (s + 1) * B).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pretrain.data.sampling import keyed

ORDER_VERSION = 1
_BLOCKS_KEPT = 4


class Located(NamedTuple):
    """The samples at positions: three int64 arrays of equal length."""

    epoch: np.ndarray
    shard: np.ndarray
    sample: np.ndarray


class Order:
    """Every sample exactly once an epoch.

    counts        number of samples in each shard, int [num_shards]
    seed          in [0, 2**64)
    block_shards  shards shuffled together; a larger block mixes better and reads more shards at a time

    Raises ValueError for no samples, a negative count, seed or position, or a block of less than one shard.
    """

    def __init__(self, counts: np.ndarray, seed: int, block_shards: int) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        if self.counts.ndim != 1 or (self.counts < 0).any():
            raise ValueError(f"counts must be one number >= 0 per shard, got shape {self.counts.shape}")
        self.num_samples = int(self.counts.sum())
        if self.num_samples == 0:
            raise ValueError(f"the data set has no samples in its {len(self.counts)} shard(s)")
        if block_shards < 1:
            raise ValueError(f"block_shards must be at least 1, got {block_shards}")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed must be in [0, 2**64), got {seed}")
        self.seed = seed
        self.block_shards = block_shards
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], _Block] = OrderedDict()

    def at(self, position: int) -> tuple[int, int, int]:
        """(epoch, shard, sample in shard) of one position."""
        located = self.at_many(np.array([position]))
        return int(located.epoch[0]), int(located.shard[0]), int(located.sample[0])

    def at_many(self, positions: np.ndarray) -> Located:
        """The same for int64 [n] positions; fast when they are close to each other."""
        positions = np.asarray(positions, dtype=np.int64)
        if len(positions) and positions.min() < 0:
            raise ValueError(f"position must be >= 0, got {positions.min()}")
        epochs, offsets = np.divmod(positions, self.num_samples)
        shards, samples = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs):
            in_epoch = np.flatnonzero(epochs == epoch)
            blocks = np.searchsorted(self._epoch(int(epoch)).ends, offsets[in_epoch], side="right")
            for block in np.unique(blocks):
                chosen = in_epoch[blocks == block]
                shards[chosen], samples[chosen] = self._block(int(epoch), int(block)).at(offsets[chosen])
        return Located(epochs, shards, samples)

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            shards = keyed.permutation(self.seed, epoch, keyed.SHARD_ORDER, length=len(self.counts))
            starts = np.arange(0, len(shards), self.block_shards)
            ends = np.cumsum(np.add.reduceat(self.counts[shards], starts))
            remember(self._epochs, epoch, _Epoch(shards, ends), most=2)
        return self._epochs[epoch]

    def _block(self, epoch: int, block: int) -> _Block:
        if (epoch, block) not in self._blocks:
            of = self._epoch(epoch)
            shards = of.shards[block * self.block_shards : (block + 1) * self.block_shards]
            shard_ends = np.cumsum(self.counts[shards])
            length = int(shard_ends[-1])
            shuffled = keyed.permutation(self.seed, epoch, keyed.BLOCK_ORDER, block, length=length)
            shuffled = shuffled.astype(np.uint32 if length < 1 << 32 else np.int64)
            made = _Block(int(of.ends[block]) - length, shards, shard_ends, shuffled)
            remember(self._blocks, (epoch, block), made, most=_BLOCKS_KEPT)
        return self._blocks[epoch, block]


def rank_positions(step: int, global_batch: int, rank: int, world_size: int) -> range:
    """Positions of one rank in global batch `step`: its contiguous slice of [step * B, (step + 1) * B)."""
    if global_batch % world_size:
        raise ValueError(f"global batch size {global_batch} is not a multiple of {world_size} ranks")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in [0, {world_size})")
    share = global_batch // world_size
    first = step * global_batch + rank * share
    return range(first, first + share)


@dataclass(frozen=True)
class _Epoch:
    shards: np.ndarray  # the epoch's permutation of all shards
    ends: np.ndarray  # per block: number of samples up to its end


@dataclass(frozen=True)
class _Block:
    start: int
    shards: np.ndarray
    shard_ends: np.ndarray
    shuffled: np.ndarray

    def at(self, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        index = self.shuffled[offsets - self.start].astype(np.int64)
        which = np.searchsorted(self.shard_ends, index, side="right")
        before = np.where(which > 0, self.shard_ends[which - 1], 0)
        return self.shards[which], index - before


def remember(memo: OrderedDict, key: object, value: object, *, most: int) -> None:
    """Keep the `most` newest entries."""
    memo[key] = value
    while len(memo) > most:
        memo.popitem(last=False)
