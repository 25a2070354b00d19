import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.sampling import keyed

words = st.integers(0, 2**64 - 1)


@given(words, words, words, words)
def test_a_generator_is_philox_with_the_seed_and_purpose_as_key_and_the_position_as_counter(
    seed, position, purpose, part
):
    expected = np.random.Philox(
        key=np.array([seed, purpose], np.uint64), counter=np.array([0, position, part, 0], np.uint64)
    )
    ours = keyed.generator(seed, position, purpose, part).bit_generator.random_raw(9)
    assert (ours == expected.random_raw(9)).all()


def test_drawing_much_at_one_position_never_reaches_the_numbers_of_the_next():
    here = keyed.generator(1, 0, 2).bit_generator.random_raw(4096)
    there = keyed.generator(1, 1, 2).bit_generator.random_raw(4096)
    assert not set(here.tolist()) & set(there.tolist())


def test_every_purpose_has_its_own_numbers():
    purposes = [keyed.SHARD_ORDER, keyed.BLOCK_ORDER, keyed.SUBSTITUTE]
    purposes += [keyed.view_purpose(i) for i in range(20)]
    purposes += [keyed.noise_purpose(name) for name in ("mask", "mask2", "noise")]
    first = {keyed.generator(0, 7, purpose).random() for purpose in purposes}
    assert len(first) == len(purposes) == len(set(purposes))


def test_views_are_uncorrelated():
    draws = np.array([[keyed.generator(3, p, keyed.view_purpose(v)).random() for v in range(4)] for p in range(2000)])
    correlation = np.corrcoef(draws.T) - np.eye(4)
    assert np.abs(correlation).max() < 0.1
    assert abs(draws.mean() - 0.5) < 0.02


@given(st.integers(0, 50), st.integers(0, 2**64 - 1))
def test_a_permutation_holds_every_index_once(length, seed):
    assert sorted(keyed.permutation(seed, 3, 1, length=length)) == list(range(length))


def test_a_permutation_is_the_same_in_every_version():
    assert keyed.permutation(0, 0, 1, length=8).tolist() == [5, 3, 7, 2, 4, 1, 0, 6]
