from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pretrain.data.sampling.order import ORDER_VERSION, Order, rank_positions

shard_counts = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum)


@given(shard_counts, st.integers(0, 2**64 - 1), st.integers(1, 13), st.integers(0, 5))
def test_an_epoch_holds_every_sample_once(counts, seed, block_shards, epoch):
    order = Order(counts, seed, block_shards)
    located = order.at_many(np.arange(epoch * sum(counts), (epoch + 1) * sum(counts)))
    seen = sorted(zip(located.shard.tolist(), located.sample.tolist(), strict=True))
    assert seen == [(shard, sample) for shard, count in enumerate(counts) for sample in range(count)]
    assert (located.epoch == epoch).all()


@given(shard_counts, st.integers(1, 5), st.lists(st.integers(0, 300), max_size=40))
def test_positions_are_located_equally_one_by_one_and_together_in_any_order(counts, block_shards, positions):
    one_by_one = [Order(counts, 5, block_shards).at(position) for position in positions]
    located = Order(counts, 5, block_shards).at_many(np.array(positions, dtype=np.int64))
    together = zip(located.epoch.tolist(), located.shard.tolist(), located.sample.tolist(), strict=True)
    assert one_by_one == list(together)


def test_an_order_does_not_grow_with_the_run():
    order = Order(np.full(12, 5), 3, 2)
    for position in range(0, 60 * 20, 7):
        order.at(position)
    assert len(order._epochs) <= 2
    assert len(order._blocks) <= 4


@given(shard_counts, st.integers(1, 13))
def test_only_the_shards_of_one_block_are_read_at_a_time(counts, block_shards):
    order = Order(counts, 1, block_shards)
    shards = order.at_many(np.arange(sum(counts))).shard.tolist()
    last = {shard: index for index, shard in enumerate(shards)}
    for index in range(len(shards)):
        open_shards = {shard for shard in shards[:index] if last[shard] >= index}
        assert len(open_shards) <= block_shards


def test_epochs_and_seeds_differ():
    counts = [50] * 20

    def sequence(seed, epoch):
        located = Order(counts, seed, 4).at_many(np.arange(epoch * 1000, (epoch + 1) * 1000))
        return (located.shard * 50 + located.sample).tolist()

    assert sequence(0, 0) != sequence(0, 1) != sequence(1, 1)
    same_place = np.mean(np.array(sequence(0, 0)) == np.array(sequence(0, 1)))
    assert same_place < 0.02


def test_the_order_is_that_of_its_version():
    located = Order([3, 0, 4, 2], 11, 2).at_many(np.arange(12))
    assert ORDER_VERSION == 1
    assert list(zip(located.shard.tolist(), located.sample.tolist(), strict=True)) == EXPECTED_ORDER


def test_a_position_in_the_middle_of_a_billion_samples_is_found():
    order = Order(np.full(100_000, 10_000), 0, 8)
    position = 3 * order.num_samples + 123_456_789
    assert order.at(position) == order.at(position)
    assert order.at(position)[0] == 3
    assert sum(len(block.shuffled) for block in order._blocks.values()) <= 4 * 8 * 10_000


@pytest.mark.parametrize(
    ("counts", "seed", "block", "message"),
    [
        ([], 0, 1, "no samples"),
        ([0, 0], 0, 1, "no samples in its 2 shard"),
        ([1, -1], 0, 1, "counts"),
        ([1], -1, 1, "seed"),
        ([1], 0, 0, "block_shards"),
    ],
)
def test_impossible_orders_are_refused(counts, seed, block, message):
    with pytest.raises(ValueError, match=message):
        Order(counts, seed, block)


def test_a_negative_position_is_refused():
    with pytest.raises(ValueError, match="position"):
        Order([3], 0, 1).at(-1)


@given(st.integers(0, 50), st.integers(1, 8), st.integers(1, 8))
def test_the_slices_of_all_ranks_are_the_global_batch(step, share, world):
    batch = share * world
    joined = [p for rank in range(world) for p in rank_positions(step, batch, rank, world)]
    assert joined == list(range(step * batch, (step + 1) * batch))


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(ValueError, match="10 is not a multiple of 3"):
        rank_positions(0, 10, 0, 3)


class InterruptedTraining(RuleBasedStateMachine):
    """Training that is killed and resumed with other ranks and workers, against an undisturbed one."""

    @initialize(counts=shard_counts, block_shards=st.integers(1, 4), batch=st.sampled_from([4, 8, 12]))
    def start(self, counts, block_shards, batch):
        self.counts, self.block_shards, self.batch = counts, block_shards, batch
        self.committed = 0  # the complete state: one integer
        self.history: list[list[tuple[int, int, int]]] = []
        self._launch(1, 1)

    def _launch(self, world, workers):
        self.step_count = self.committed
        del self.history[self.committed :]
        self.world = world
        self.orders = [[Order(self.counts, 9, self.block_shards) for _ in range(workers)] for _ in range(world)]

    @rule()
    def step(self):
        ids: list[tuple[int, int, int]] = []
        for rank, workers in enumerate(self.orders):
            order = workers[self.step_count % len(workers)]
            positions = np.array(rank_positions(self.step_count, self.batch, rank, self.world))
            located = order.at_many(positions)
            ids += zip(located.epoch.tolist(), located.shard.tolist(), located.sample.tolist(), strict=True)
        self.history.append(ids)
        self.step_count += 1

    @rule()
    def save(self):
        self.committed = self.step_count

    @rule(world=st.sampled_from([1, 2, 4]), workers=st.integers(1, 3))
    def kill_and_resume(self, world, workers):
        self._launch(world, workers)

    @invariant()
    def the_ids_of_every_step_are_those_of_an_undisturbed_run(self):
        if not hasattr(self, "history"):
            return
        undisturbed = Order(self.counts, 9, self.block_shards)
        for step, ids in enumerate(self.history):
            assert ids == [undisturbed.at(p) for p in range(step * self.batch, (step + 1) * self.batch)]

    @invariant()
    def every_sample_is_seen_once_in_each_finished_epoch(self):
        if not hasattr(self, "history"):
            return
        seen = Counter(sample for ids in self.history for sample in ids)
        assert not seen or max(seen.values()) == 1
        per_epoch = Counter(epoch for epoch, _, _ in seen)
        for epoch in range(len(self.history) * self.batch // sum(self.counts)):
            assert per_epoch[epoch] == sum(self.counts)


InterruptedTraining.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
test_interrupted_training_sees_what_an_undisturbed_one_sees = InterruptedTraining.TestCase

EXPECTED_ORDER = [(3, 1), (3, 0), (2, 0), (0, 0), (0, 1), (2, 1), (2, 3), (2, 2), (0, 2), (2, 0), (2, 2), (2, 3)]
