from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.utils import accuracy

from finetune.data.examples import Example
from finetune.metrics.accuracy import Accuracy
from finetune.metrics.grid_accuracy import GridAccuracy, GridClassified
from finetune.predictions import Classes, Classified

NAMES = Classes([f"c{i}" for i in range(8)])


def example(label):
    return Example(0, "a", np.zeros((1, 1, 0), np.uint8), label)


def drawn(count=200):
    random = np.random.default_rng(0)
    labels = random.integers(0, 7, count)  # the last class has no image
    scores = random.random((count, 8)).astype(np.float32)
    scores[np.arange(count), labels] += 0.4
    return labels, scores / scores.sum(1, keepdims=True)


def measured(labels, probabilities):
    metric = Accuracy(NAMES, protocol="images as they are")
    qualities = [
        metric.update(i, example(label), Classified(row))
        for i, (label, row) in enumerate(zip(labels, probabilities, strict=True))
    ]
    metric.gather()
    return metric.compute(), qualities


def test_the_interval_of_none_of_24_is_not_empty():
    wrong = np.eye(8, dtype=np.float32)[np.ones(24, int)]
    scores, _ = measured(np.zeros(24, int), wrong)
    assert scores.values["top1"] == 0 and "24 images, 95 % interval of top-1 0.0000 to 0.1380" in scores.protocol


def test_the_numbers_equal_timms():
    labels, probabilities = drawn()
    scores, qualities = measured(labels, probabilities)
    truth, rows = torch.from_numpy(labels), torch.from_numpy(probabilities)
    for name, percent in zip(("top1", "top5"), accuracy(rows, truth, topk=(1, 5)), strict=True):
        assert scores.values[name] == pytest.approx(float(percent) / 100, abs=1e-6)
    expected = np.zeros((8, 8), np.int64)
    np.add.at(expected, (labels, probabilities.argmax(1)), 1)
    np.testing.assert_array_equal(scores.confusion, expected)
    np.testing.assert_allclose(qualities, probabilities[np.arange(len(labels)), labels])


def test_per_class_numbers_add_up_and_a_class_without_images_has_none():
    labels, probabilities = drawn()
    scores, _ = measured(labels, probabilities)
    rows = scores.per_class
    assert rows[7]["images"] == 0 and rows[7]["top1"] is None
    right = sum(row["images"] * row["top1"] for row in rows[:7])
    assert right / 200 == pytest.approx(scores.values["top1"])
    assert scores.values["mean_per_class"] == pytest.approx(np.mean([row["top1"] for row in rows[:7]]))
    assert "200 images" in scores.protocol and "images as they are" in scores.protocol


def test_two_ranks_count_the_same_as_one(monkeypatch: pytest.MonkeyPatch):
    labels, probabilities = drawn(31)
    whole = measured(labels, probabilities)[0]
    ranks = [Accuracy(NAMES, protocol="images as they are") for _ in range(2)]
    for i, (label, row) in enumerate(zip(labels, probabilities, strict=True)):
        ranks[i % 2].update(i, example(label), Classified(row))
    parts = [[rank.confusion for rank in ranks], [rank.in_top5 for rank in ranks]]
    everyone = "finetune.metrics.metric.distributed.all_gather_object"
    monkeypatch.setattr(everyone, lambda own: parts[0 if own.ndim == 2 else 1])
    ranks[0].gather()
    both = ranks[0].compute()
    assert both.values == whole.values and both.per_class == whole.per_class


def test_an_image_without_label_is_not_counted_and_no_label_is_an_error():
    with pytest.raises(ValueError, match="no image of the validation set has a label"):
        measured([-1, None], np.full((2, 8), 0.125, np.float32))


def test_the_best_classifier_of_a_grid_is_chosen_and_all_are_reported():
    labels, probabilities = drawn()
    random = np.random.default_rng(1)
    top5 = np.stack([[random.permutation(8)[:5] for _ in range(3)] for _ in labels]).astype(np.int32)
    top5[:, 1] = np.argsort(-probabilities, axis=1)[:, :5]  # the second is far better than chance
    chosen = []
    metric = GridAccuracy(NAMES, ["first", "second", "third"], protocol="p", choose=chosen.append)
    for i, (label, row, top) in enumerate(zip(labels, probabilities, top5, strict=True)):
        metric.update(i, example(label), GridClassified(row, top))
    metric.gather()
    scores, alone = metric.compute(), measured(labels, probabilities)[0]
    assert chosen == [1]
    assert scores.values["top1"] == alone.values["top1"] == scores.values["top1 second"]
    assert scores.values["top5"] == alone.values["top5"]
    assert (scores.confusion == alone.confusion).all()
    for at, title in enumerate(["first", "second", "third"]):
        assert scores.values[f"top1 {title}"] == pytest.approx(np.mean(top5[:, at, 0] == labels))
    assert "chosen on these same images" in scores.protocol and "chosen: second" in scores.protocol
