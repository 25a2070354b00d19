"""Time and memory of the order, and the bytes that each node reads, at 4,096 ranks and 10^9 samples.

    python -m benchmarks.assignment [--plot docs/assignment.png]

The order is computed for the positions of one node at a time; the cluster is simulated: 8 ranks per node, 8 images per
rank and step, 100,000 shards of 10,000 samples of 110 kB. Two ways to read are counted. "samples": positional
reads of the samples that the node trains on. "shards": every shard of which a node needs a sample is fetched completely
and kept for its block, as in a cache of shards.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.data.sampling.order import Order, rank_positions

SHARDS, PER_SHARD, SAMPLE = 100_000, 10_000, 110_000
RANKS_PER_NODE, IMAGES_PER_RANK, STEPS = 8, 8, 20
NODES = (1, 8, 64, 512)
BLOCKS = (1, 8, 64)


@dataclass(frozen=True)
class Measured:
    """Of one node. seconds: of one rank's order function per step. first: of its first step. Bytes per step."""

    nodes: int
    block: int
    seconds: float
    first: float
    samples: float
    shards: float


def measure(nodes: int, block: int) -> Measured:
    """Run the order for the middle node over some steps in the middle of an epoch."""
    order = Order(np.full(SHARDS, PER_SHARD), seed=0, block_shards=block)
    world = nodes * RANKS_PER_NODE
    batch = world * IMAGES_PER_RANK
    start = SHARDS * PER_SHARD // 2 // batch
    begun = time.process_time()
    order.at_many(np.array(rank_positions(start, batch, 0, world)))
    first = time.process_time() - begun
    seconds, fetched = 0.0, set()
    # Several blocks where they are short, part of one where they are long.
    steps = min(400, max(STEPS, 8 * block * PER_SHARD // batch))
    for step in range(start, start + steps):
        for rank in range(nodes // 2 * RANKS_PER_NODE, nodes // 2 * RANKS_PER_NODE + RANKS_PER_NODE):
            positions = np.array(rank_positions(step, batch, rank, world))
            begun = time.process_time()
            located = order.at_many(positions)
            seconds += time.process_time() - begun
            fetched |= set(located.shard.tolist())
    samples = RANKS_PER_NODE * IMAGES_PER_RANK * SAMPLE
    # A window shorter than the block's life has fetched what the rest of the block needs too.
    life = max(steps, block * PER_SHARD / batch)
    return Measured(
        nodes, block, seconds / steps / RANKS_PER_NODE, first, samples, len(fetched) * PER_SHARD * SAMPLE / life
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path)
    chosen = parser.parse_args()
    found = [measure(nodes, block) for block in BLOCKS for nodes in NODES]
    print("nodes ranks block_shards  order: first s  us/step  read/node/step: samples MB  shards MB  times")
    for row in found:
        times = row.shards / row.samples
        print(
            f"{row.nodes:5d} {row.nodes * RANKS_PER_NODE:5d} {row.block:12d} {row.first:14.3f} "
            f"{row.seconds * 1e6:8.0f} {row.samples / 1e6:27.1f} {row.shards / 1e6:10.1f} {times:6.1f}"
        )
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")
    if chosen.plot:
        _plot(found, chosen.plot)
    return 0


def _plot(found: list[Measured], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for block in BLOCKS:
        rows = [row for row in found if row.block == block]
        ranks = [row.nodes * RANKS_PER_NODE for row in rows]
        axes.loglog(ranks, [row.shards / 1e6 for row in rows], "o-", label=f"complete shards, block_shards {block}")
    ranks = [nodes * RANKS_PER_NODE for nodes in NODES]
    axes.loglog(ranks, [found[0].samples / 1e6] * len(ranks), "k--", label="samples alone (positional reads)")
    axes.set(xlabel="ranks", ylabel="MB read by a node in a step", title="10^9 samples of 110 kB, 8 a rank and step")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
