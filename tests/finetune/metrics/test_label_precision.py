"""Mean average precision and F1 of labels, against torchmetrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multilabel_average_precision, multilabel_f1_score

from finetune.data.examples import Example
from finetune.metrics.label_precision import LabelPrecision, average_precision
from finetune.predictions import Classes, Labelled


def example(target: np.ndarray | None) -> Example:
    return Example("", "", np.zeros((1, 1, 0), np.uint8), target)


@pytest.mark.parametrize("levels", [4, 1000])  # many ties, and hardly any
def test_ap_and_f1_are_those_of_torchmetrics(levels: int):
    generator = np.random.default_rng(levels)
    truth = generator.random((80, 6)) < 0.3
    truth[:, 5] = False  # a label without an image
    scores = (generator.integers(0, levels, (80, 6)) / levels).astype(np.float32)
    metric = LabelPrecision(Classes("abcdef"), 0.5, protocol="test")
    for i in generator.permutation(80).tolist():
        metric.update(i, example(truth[i].astype(np.float32)), Labelled(scores[i], 0.5))
    metric.gather()
    found = metric.compute()
    given, wanted = torch.from_numpy(scores), torch.from_numpy(truth).long()
    expected = multilabel_average_precision(given, wanted, num_labels=6, average=None)[:5].numpy()
    assert [row["ap"] for row in found.per_class[:5]] == pytest.approx(expected.tolist(), abs=1e-6)
    assert found.per_class[5]["ap"] is None and "1 labels without an image do not count" in found.protocol
    assert found.primary == ("map", pytest.approx(float(expected.mean()), abs=1e-6))
    above = (given >= 0.5).float()  # torchmetrics counts from above the threshold
    f1 = multilabel_f1_score(above, wanted, num_labels=6, average=None)[:5].numpy()
    assert found.values["macro_f1"] == pytest.approx(float(f1.mean()), abs=1e-6)
    micro = multilabel_f1_score(above, wanted, num_labels=6, average="micro")
    assert found.values["micro_f1"] == pytest.approx(float(micro), abs=1e-6)
    assert found.values["exact"] == ((scores >= 0.5) == truth).all(1).mean()


def test_the_quality_of_an_image_is_its_own_average_precision():
    metric = LabelPrecision(Classes("abc"), 0.5, protocol="test")
    scores = np.array([0.9, 0.1, 0.5], np.float32)
    assert metric.update(0, example(np.array([1, 0, 1], np.float32)), Labelled(scores, 0.5)) == 1
    assert metric.update(1, example(np.array([0, 1, 0], np.float32)), Labelled(scores, 0.5)) == pytest.approx(1 / 3)
    assert math.isnan(metric.update(2, example(np.zeros(3, np.float32)), Labelled(scores, 0.5)))
    assert math.isnan(metric.update(3, example(None), Labelled(scores, 0.5)))
    assert math.isnan(average_precision(np.zeros(3, bool), scores))


def test_a_set_without_labels_is_refused():
    with pytest.raises(ValueError, match="no image of the validation set has a label"):
        LabelPrecision(Classes("abc"), 0.5, protocol="test").compute()
