"""Which sample takes the place of a bad one, and when there are too many bad ones."""

import numpy as np
import pytest

from pretrain.data.sampling.bad_samples import (
    MAX_SUBSTITUTES,
    BadList,
    BadRecord,
    BadSamples,
    TooManyBadSamplesError,
    candidates,
)


def test_candidates_are_keyed_by_position_and_spread_over_all_other_samples():
    counts = np.array([3, 0, 5])
    every = {(0, i) for i in range(3)} | {(2, i) for i in range(5)}
    assert list(candidates(counts, 1, 17, (0, 1))) == list(candidates(counts, 1, 17, (0, 1)))
    assert list(candidates(counts, 1, 17, (0, 1))) != list(candidates(counts, 1, 18, (0, 1)))
    assert len(list(candidates(counts, 1, 17, (0, 1)))) == MAX_SUBSTITUTES
    for own in every:
        assert {place for position in range(60) for place in candidates(counts, 1, position, own)} == every - {own}
    assert list(candidates(np.array([1]), 1, 17, (0, 0))) == []


def bad(position: int, key: str = "k") -> BadRecord:
    return BadRecord(
        position=position, shard="s.tar", key=key, reason="empty file", substitute="s.tar/x", passed_over=False
    )


def test_bad_samples_are_counted_and_each_is_recorded_once():
    recorded = []
    counter = BadSamples(0.5, record=recorded.append, known=[("s.tar", "old")])
    counter.observe(10, [bad(0, "a"), bad(3, "b")])
    counter.observe(10, [bad(12, "a"), bad(13, "old")])
    assert [record["key"] for record in recorded] == ["a", "b"]
    assert (counter.num_seen, counter.num_bad) == (20, 4)


def test_too_many_bad_samples_stop_the_run_with_an_example():
    counter = BadSamples(0.01, min_seen=100)
    counter.observe(99, [bad(i) for i in range(5)])
    with pytest.raises(TooManyBadSamplesError, match=r"5 of 105 reads .*max_bad_fraction=0.01") as error:
        counter.observe(1, [])
    assert "Check the shards" in str(error.value)
    with pytest.raises(TooManyBadSamplesError, match=r"s\.tar/k: empty file"):
        BadSamples(0.0, min_seen=1).observe(8, [bad(0)])


def test_chance_does_not_stop_a_rank_whose_samples_are_half_as_bad_as_allowed():
    def stops(fraction: float, seed: int) -> bool:
        counter = BadSamples(0.01)
        try:
            for number in np.random.default_rng(seed).binomial(64, fraction, size=100).tolist():
                counter.observe(64, [bad(0)] * number)
        except TooManyBadSamplesError:
            return True
        return False

    assert sum(stops(0.005, seed) for seed in range(300)) <= 3
    assert all(stops(0.03, seed) for seed in range(50))


def record(key: str) -> BadRecord:
    return BadRecord(position=1, shard="s.tar", key=key, reason="empty", substitute="s.tar/x", passed_over=False)


def test_a_list_truncated_by_a_kill_can_be_read_and_continued(tmp_path):
    told = []
    BadList(tmp_path, rank=0, say=told.append).add(record("a"))
    path = tmp_path / "bad_samples.rank0.jsonl"
    with path.open("a") as file:
        file.write('{"position": 4, "sha')
    again = BadList(tmp_path, rank=0, say=told.append)
    assert again.known() == {("s.tar", "a")}
    again.add(record("b"))
    assert BadList(tmp_path, rank=0, say=told.append).known() == {("s.tar", "a"), ("s.tar", "b")}
    assert told[0] == "bad sample s.tar/a: empty; used s.tar/x instead"
