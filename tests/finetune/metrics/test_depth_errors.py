"""Depth's numbers by hand, and what they must not depend on."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.data.examples import Example
from finetune.metrics.depth_errors import DepthMetric, inside
from finetune.predictions import DepthMap


def metric(**options: object) -> DepthMetric:
    return DepthMetric(**{"min_depth": 0.1, "max_depth": 10.0, "protocol": "test", **options})  # pyright: ignore


def example(depth: np.ndarray) -> Example:
    return Example("a", "a.png", np.zeros((*depth.shape, 0), np.uint8), depth.astype(np.float32))


def scored(pairs: list[tuple[np.ndarray, np.ndarray]], **options: object) -> dict[str, float]:
    made = metric(**options)
    for i, (truth, predicted) in enumerate(pairs):
        made.update(i, example(truth), DepthMap(predicted.astype(np.float32)))
    made.gather()
    return made.compute().values


def test_the_errors_of_two_pixels_by_hand():
    values = scored([(np.array([[2.0, 4.0]]), np.array([[2.0, 5.5]]))])
    assert values["delta1"] == 0.5 and values["delta2"] == 1.0
    assert values["abs_rel"] == pytest.approx(0.375 / 2)
    assert values["sq_rel"] == pytest.approx(1.5**2 / 4 / 2)
    assert values["rmse"] == pytest.approx(1.5 / 2**0.5)
    assert values["log10"] == pytest.approx(np.log10(1.375) / 2)
    assert values["silog"] == pytest.approx(100 * np.log(1.375) / 2)


def test_a_scaled_prediction_has_no_scale_invariant_error():
    truth = np.random.default_rng(0).uniform(1, 3, (5, 7))
    values = scored([(truth, truth * 2)])
    assert values["silog"] == pytest.approx(0, abs=1e-4)
    assert values["abs_rel"] == pytest.approx(1, abs=1e-5)


def test_unknown_and_far_depth_is_left_out_and_predictions_are_clipped():
    values = scored([(np.array([[0.0, 50.0, 10.0]]), np.array([[3.0, 3.0, 99.0]]))])
    assert values["delta1"] == 1.0 and values["rmse"] == 0.0


def test_images_count_equally_and_their_order_changes_nothing():
    rng = np.random.default_rng(1)
    pairs = [(rng.uniform(1, 9, size), rng.uniform(1, 9, size)) for size in ((2, 3), (20, 30), (5, 5))]
    whole = scored(pairs)
    apart = [scored([pair]) for pair in pairs]
    assert whole["rmse"] == pytest.approx(sum(one["rmse"] for one in apart) / 3)
    parts = metric()
    for i in (2, 0, 1, 1):  # one image twice
        parts.update(i, example(pairs[i][0]), DepthMap(pairs[i][1].astype(np.float32)))
    parts.gather()
    assert parts.compute().values == whole


def test_the_crops_are_those_of_the_papers():
    rows, columns = np.nonzero(inside((480, 640), "eigen"))
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (45, 471, 41, 601)
    rows, columns = np.nonzero(inside((375, 1242), "garg"))
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (153, 371, 44, 1197)
    assert inside((3, 4), "none").all()


def test_no_depth_anywhere_is_an_error():
    with pytest.raises(ValueError, match="none of the 1 images has a depth"):
        scored([(np.zeros((2, 2)), np.ones((2, 2)))])


def test_a_prediction_of_another_size_is_refused_by_name():
    with pytest.raises(ValueError, match=r"a\.png: predicted a map of"):
        scored([(np.ones((2, 2)), np.ones((2, 3)))])
