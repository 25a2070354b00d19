"""Samples of several data sets in one order: by weights, each set in an order of its own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.sampling.mixture import ROUND, MixedOrder, Mixture

sizes = st.lists(st.integers(50, 400), min_size=1, max_size=4)
few = settings(max_examples=20, deadline=None)  # 2,048 positions each
batches = st.integers(1, 7)


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[MixedOrder, list[int]]:
    """An order with two shards for each set, and the sizes of the sets."""
    each = draw(sizes)
    steps = [0, *sorted(draw(st.sets(st.integers(1, 150), max_size=2)))]
    weights = st.lists(st.sampled_from([0.0, 1e-3, 1.0, 3.0]), min_size=len(each), max_size=len(each)).filter(any)
    rows = [draw(weights) for _ in steps]
    names = tuple(f"set{number}" for number in range(len(each)))
    first = tuple(range(0, 2 * len(each), 2))
    shares = tuple(tuple(weight / sum(row) for weight in row) for row in rows)
    counts = [half for size in each for half in (size // 2, size - size // 2)]
    mixture = Mixture(names, first, tuple(steps), shares)
    return MixedOrder(np.array(counts), 3, 1, mixture, draw(batches)), each


def of(shares: list[float], *, size: int = 1000) -> MixedOrder:
    names = tuple(f"set{number}" for number in range(len(shares)))
    mixture = Mixture(names, tuple(range(len(shares))), (0,), (tuple(shares),))
    return MixedOrder(np.full(len(shares), size), 1, 8, mixture, 1)


@few
@given(mixtures())
def test_each_set_gives_its_samples_in_turn_and_all_of_them_once_in_its_epochs(drawn):
    order, each = drawn
    last = order.mixture.steps[-1] * order.global_batch
    positions = np.arange(last + ROUND)  # complete rounds
    sets, turns = order.turns(positions)
    located = np.stack(order.at_many(positions), axis=1)
    for number, size in enumerate(each):
        mine = sets == number
        assert np.array_equal(np.sort(turns[mine]), np.arange(mine.sum())), "every turn once, none left out"
        rows = located[mine][np.argsort(turns[mine])]
        assert set(rows[:, 1]) <= {2 * number, 2 * number + 1}, "its own shards"
        for epoch in range(len(rows) // size):
            once = rows[epoch * size : (epoch + 1) * size]
            assert set(once[:, 0]) == {epoch} and len(np.unique(once, axis=0)) == size


@few
@given(mixtures(), st.lists(st.integers(0, 3 * ROUND), max_size=12))
def test_the_samples_of_a_position_are_the_same_alone_and_with_others(drawn, positions):
    order, _ = drawn
    together = order.at_many(np.array(positions, dtype=np.int64))
    for place, position in enumerate(positions):
        alone = order.at_many(np.array([position]))
        assert [int(row[0]) for row in alone] == [int(row[place]) for row in together]


@few
@given(mixtures())
def test_what_was_taken_of_each_set_is_what_the_positions_show(drawn):
    order, each = drawn
    sets, _ = order.turns(np.arange(2 * ROUND))
    ends = [step * order.global_batch for step in order.mixture.steps]
    for end in [*ends, ends[-1] + ROUND]:
        if end <= 2 * ROUND:
            assert order.taken(end) == [int((sets[:end] == number).sum()) for number in range(len(each))]


@pytest.mark.parametrize("shares", [[0.5, 0.3, 0.2], [1 / 3] * 3, [0.999, 0.001], [1e-6, 1 - 1e-6]])
def test_shares_hold_within_one_percent_and_exactly_in_the_long_run(shares: list[float]):
    order = of(shares)
    for positions in (10_000, 10**6, 10**12):
        for taken, share in zip(order.taken(positions), shares, strict=True):
            assert abs(taken - share * positions) <= len(shares) + 1e-11 * positions
    sets, _ = order.turns(np.arange(5 * ROUND, 6 * ROUND))
    for number, share in enumerate(shares):
        assert abs((sets == number).mean() - share) < 0.01


def test_sets_are_mixed_within_a_round_and_do_not_follow_each_other():
    sets, _ = of([0.5, 0.5]).turns(np.arange(ROUND))
    assert 0.4 < np.mean(sets[1:] != sets[:-1]) < 0.6


def test_a_set_that_is_added_does_not_change_the_order_of_the_others():
    def first_samples(order: MixedOrder, number: int) -> list[int]:
        sets, turns = order.turns(np.arange(2 * ROUND))
        located = order.at_many(np.arange(2 * ROUND))
        mine = np.flatnonzero(sets == number)
        return located.sample[mine[np.argsort(turns[mine])]][:200].tolist()

    two, three = of([0.5, 0.5]), of([0.4, 0.4, 0.2])
    assert first_samples(two, 1) == first_samples(three, 1) != first_samples(two, 0)


def test_weights_change_at_their_step_and_not_before():
    mixture = Mixture(("a", "b"), (0, 1), (0, 50), ((1.0, 0.0), (0.0, 1.0)))
    sets, turns = MixedOrder(np.array([30, 30]), 0, 1, mixture, 4).turns(np.arange(200 + ROUND))
    assert sets.tolist() == [0] * 200 + [1] * ROUND
    assert sorted(turns[:200]) == list(range(200)) and sorted(turns[200:]) == list(range(ROUND))


def test_a_negative_position_is_refused():
    with pytest.raises(ValueError, match="position must be >= 0, got -1"):
        of([1.0]).at_many(np.array([-1]))
