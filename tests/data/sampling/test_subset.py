from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.sampling.subset import of_each_class


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0.01, 1.0), st.integers(0, 99))
def test_a_fraction_is_of_each_class_alike_and_loses_none(labels, fraction, seed):
    values = np.array(labels)
    chosen = of_each_class(values, fraction=fraction, seed=seed)
    assert (np.diff(chosen) > 0).all()
    for label in set(labels):
        count = int((values == label).sum())
        assert (values[chosen] == label).sum() == max(1, round(fraction * count))
    assert set(of_each_class(values, fraction=fraction / 2, seed=seed)) <= set(chosen)


def test_a_number_of_each_class_omits_images_without_a_class():
    labels = np.arange(60) % 3 - 1
    chosen = of_each_class(labels, per_class=4, seed=3)
    assert sorted(labels[chosen].tolist()) == [0] * 4 + [1] * 4
    assert not np.array_equal(chosen, of_each_class(labels, per_class=4, seed=4))
    with pytest.raises(ValueError, match="per_class 21: class dog has only 20 images"):
        of_each_class(labels, per_class=21, names=["dog", "cat"])
