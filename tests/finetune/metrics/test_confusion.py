"""mIoU against torchmetrics, and what it must not depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchmetrics.classification as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.examples import Example
from finetune.metrics.confusion import SegmentationMetric, confusion
from finetune.predictions import Classes, ClassMap


def example(target: np.ndarray, name: str = "a.png") -> Example:
    return Example(name, name, np.zeros((*target.shape, 0), np.uint8), target)


def maps(count: int, classes: int, seed: int, *, void: float = 0.1) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        size = tuple(rng.integers(3, 20, 2))
        truth = rng.integers(0, classes, size).astype(np.uint8)
        predicted = np.where(rng.random(size) < 0.6, truth, rng.integers(0, classes, size)).astype(np.uint8)
        truth[rng.random(size) < void] = 255
        made.append((truth, predicted))
    return made


def scored(pairs: list[tuple[np.ndarray, np.ndarray]], classes: int) -> SegmentationMetric:
    metric = SegmentationMetric(Classes([f"c{i}" for i in range(classes)]), protocol="test")
    for i, (truth, predicted) in enumerate(pairs):
        metric.update(i, example(truth), ClassMap(predicted))
    metric.gather()
    return metric


@pytest.mark.parametrize("classes", [2, 11, 150])
def test_the_numbers_are_those_of_torchmetrics(classes: int):
    pairs = maps(12, classes, seed=classes)
    scores = scored(pairs, classes).compute()
    known = {"num_classes": classes, "ignore_index": 255}
    for name, made in {
        "mIoU": reference.MulticlassJaccardIndex(**known, average="macro"),
        "pixel_accuracy": reference.MulticlassAccuracy(**known, average="micro"),
        "mean_accuracy": reference.MulticlassAccuracy(**known, average="macro"),
        "mean_dice": reference.MulticlassF1Score(**known, average="macro"),
    }.items():
        for truth, predicted in pairs:
            made.update(
                torch.from_numpy(predicted.astype(np.int64)).flatten(), torch.from_numpy(truth).long().flatten()
            )
        assert scores.values[name] == pytest.approx(float(made.compute()), abs=1e-6), name


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_the_order_of_images_and_their_parts_change_nothing(seed: int):
    pairs = maps(6, 5, seed)
    whole = scored(pairs, 5)
    parts = scored(pairs[:2], 5).counts + scored(pairs[2:], 5).counts
    assert (whole.counts == parts).all()
    assert scored(pairs[::-1], 5).compute().values == whole.compute().values


def test_two_ranks_count_the_same_as_one(monkeypatch: pytest.MonkeyPatch):
    pairs = maps(5, 4, seed=2)
    whole = scored(pairs, 4).compute()
    ranks = [SegmentationMetric(Classes([f"c{i}" for i in range(4)]), protocol="test") for _ in range(2)]
    for i, (truth, predicted) in enumerate(pairs):
        ranks[i % 2].update(i, example(truth), ClassMap(predicted))
    counts, seen = [[getattr(rank, name) for rank in ranks] for name in ("counts", "_seen")]
    everyone = "finetune.metrics.metric.distributed.all_gather_object"
    monkeypatch.setattr(everyone, lambda own: counts if isinstance(own, np.ndarray) else seen)
    ranks[0].gather()
    both = ranks[0].compute()
    assert both.values == whole.values and both.protocol == whole.protocol


def test_an_image_given_twice_counts_once():
    (pair,) = maps(1, 3, seed=0)
    metric = scored([pair], 3)
    before = metric.counts.copy()
    metric.update(0, example(pair[0]), ClassMap(pair[1]))
    assert (metric.counts == before).all()


def test_void_does_not_count_and_absent_classes_are_left_out_of_the_mean():
    truth = np.array([[0, 0, 255, 1]], np.uint8)
    metric = scored([(truth, np.array([[0, 1, 2, 1]], np.uint8))], 4)
    scores = metric.compute()
    assert metric.counts.sum() == 3
    assert scores.values["mIoU"] == pytest.approx(0.5)
    assert [row["iou"] for row in scores.per_class] == [0.5, 0.5, None, None]
    assert scores.values["pixel_accuracy"] == pytest.approx(2 / 3)


def test_a_class_that_is_only_predicted_counts_as_a_zero():
    scores = scored([(np.zeros((1, 4), np.uint8), np.array([[0, 0, 0, 2]], np.uint8))], 3).compute()
    assert scores.values["mIoU"] == pytest.approx(0.75 / 2)


def test_the_protocol_states_the_number_of_images_and_what_was_left_out():
    text = scored(maps(3, 4, seed=1), 4).compute().protocol
    assert text.startswith("3 images, test;") and "void (255)" in text and "4 classes" in text


def test_wrong_sizes_and_unknown_ids_are_refused_by_name():
    small, large = np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8)
    with pytest.raises(ValueError, match=r"street\.png: predicted a map of \(2, 3\)"):
        confusion(small, large, 3, name="street.png")
    with pytest.raises(ValueError, match=r"street\.png: the prediction holds ids 0 to 0, of 0 classes|truth holds"):
        confusion(small + 7, small, 3, name="street.png")


def test_a_set_without_ground_truth_is_an_error():
    with pytest.raises(ValueError, match="all are void"):
        scored([(np.full((2, 2), 255, np.uint8), np.zeros((2, 2), np.uint8))], 3).compute()
