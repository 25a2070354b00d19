"""Parts of a set: a fraction of each class, N of each class, the first N."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.config import DataSource
from finetune.data.subset import subset
from tests.finetune.planted import Planted


def labels(examples: object) -> list[int]:
    return np.asarray(getattr(examples, "labels")).tolist()  # noqa: B009


def test_a_fraction_is_per_class_and_a_larger_one_contains_it():
    whole = Planted(40)
    small, large = (subset(whole, DataSource(images="x", fraction=f)) for f in (0.1, 0.5))
    assert np.bincount(labels(small)).tolist() == [2, 2] and np.bincount(labels(large)).tolist() == [10, 10]
    assert {small[i].id for i in range(4)} <= {large[i].id for i in range(20)}
    assert subset(whole, DataSource(images="x", fraction=1.0)) is whole


def test_a_fraction_and_all_others_are_the_whole_set():
    whole = Planted(41)
    sets = (
        DataSource(images="x", fraction=0.2, subset_seed=5),
        DataSource(images="x", without_fraction=0.2, subset_seed=5),
    )
    val, train = ([part[i].id for i in range(len(part))] for part in (subset(whole, source) for source in sets))
    assert len(val) == 8 and not {*val} & {*train} and sorted(val + train) == [whole[i].id for i in range(41)]


def test_k_images_of_each_class_chosen_by_the_seed():
    whole = Planted(40)
    parts = [subset(whole, DataSource(images="x", per_class=3, subset_seed=seed)) for seed in (0, 0, 1)]
    chosen = [[part[i].id for i in range(len(part))] for part in parts]
    assert chosen[0] == chosen[1] != chosen[2] and chosen[0] == sorted(chosen[0])
    assert np.bincount(labels(parts[0])).tolist() == [3, 3]
    assert parts[0].fingerprint == parts[1].fingerprint != parts[2].fingerprint != whole.fingerprint


def test_limit_selects_the_first_examples():
    part = subset(Planted(10), DataSource(images="x", limit=3))
    assert [part[i].id for i in range(len(part))] == [0, 1, 2]


def test_more_than_a_class_has_is_refused():
    with pytest.raises(ValueError, match="per_class 6: class dark has only 5 images"):
        subset(Planted(10), DataSource(images="x", per_class=6))


def test_k_of_each_class_needs_classes():
    whole = Planted(10)
    del whole.labels
    with pytest.raises(ValueError, match="these images have no class labels"):
        subset(whole, DataSource(images="x", per_class=1))
