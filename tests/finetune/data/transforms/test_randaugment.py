from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from timm.data.auto_augment import _RAND_INCREASING_TRANSFORMS, LEVEL_TO_ARG, NAME_TO_OP

from finetune.data.transforms import randaugment

IMAGE = np.random.default_rng(0).integers(0, 256, (24, 31, 3), dtype=np.uint8)
FILL = (124, 116, 104)


def test_the_operations_are_those_of_timms_policy():
    assert tuple(randaugment.OPERATIONS) == tuple(_RAND_INCREASING_TRANSFORMS)


@pytest.mark.parametrize("name", _RAND_INCREASING_TRANSFORMS)
@pytest.mark.parametrize("level", [0.0, 3.3, 9.0, 9.9])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_each_operation_equals_timms_at_every_level(name, level, sign, monkeypatch):
    monkeypatch.setattr("timm.data.auto_augment._randomly_negate", lambda value: sign * value)
    levels = LEVEL_TO_ARG[name]
    arguments = levels(level, {}) if levels else ()
    picture = Image.fromarray(IMAGE)
    expected = NAME_TO_OP[name](picture, *arguments, fillcolor=FILL, resample=Image.Resampling.BICUBIC)
    found = randaugment.apply(name, picture, level, sign, fill=FILL)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def _augmented(uniforms):
    return randaugment.rand_augment(IMAGE, np.array(uniforms), magnitude=9.0, magnitude_std=0.5, fill=FILL)


def test_the_given_random_numbers_determine_the_result():
    drawn = np.random.default_rng(1).random((2, randaugment.UNIFORMS))
    drawn[:, 1] = 0.1  # both are applied
    once, again = _augmented(drawn), _augmented(drawn)
    np.testing.assert_array_equal(once, again)
    assert (once != IMAGE).any()
    drawn[:, 1] = 0.5  # neither is
    np.testing.assert_array_equal(_augmented(drawn), IMAGE)


def test_magnitudes_are_normal_around_the_mean():
    first, second = np.random.default_rng(2).random((2, 20_000))
    drawn = [randaugment._gaussian(a, b) for a, b in zip(first, second, strict=True)]
    assert abs(np.mean(drawn)) < 0.03
    assert abs(np.std(drawn) - 1) < 0.03
