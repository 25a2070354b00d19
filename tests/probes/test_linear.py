"""The linear probe is the minimum it claims, and its penalty is chosen without the test images."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pretrain.probes import linear
from pretrain.probes.linear import LinearClassifier, linear_score


def blobs(count: int, *, classes: int = 3, dim: int = 6, spread: float = 1.0, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = 2 * F.one_hot(torch.arange(classes), dim).float()
    return centres[labels] + spread * torch.randn(count, dim, generator=generator), labels


@pytest.mark.parametrize("penalty", [1.0, 1e-2])
@pytest.mark.parametrize("chunk", [1 << 14, 7])
def test_the_weights_are_the_minimum_of_cross_entropy_and_penalty(
    penalty: float, chunk: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(linear, "_CHUNK", chunk)
    features, labels = blobs(60)
    with torch.no_grad():
        classifier = LinearClassifier.start(features, 3)
        fitted = classifier.fit(classifier.standardize(features), labels, penalty)
    weight, bias = (part.clone().requires_grad_() for part in (fitted.weight, fitted.bias))
    standardized = (features - features.mean(0)) / features.std(0, correction=0)
    loss = F.cross_entropy(standardized @ weight + bias, labels) + 0.5 * penalty * weight.square().sum()
    gradients = torch.autograd.grad(loss, [weight, bias])
    assert max(float(gradient.abs().max()) for gradient in gradients) < 2e-4


def test_the_scale_and_the_offset_of_a_feature_do_not_matter():
    (train, labels), (queries, truth) = blobs(120, spread=1.5), blobs(90, spread=1.5, seed=1)
    scale, offset = torch.logspace(-1, 2, 6), torch.arange(6) * 10.0
    plain = linear_score(train, labels, queries, truth)
    changed = linear_score(train * scale + offset, labels, queries * scale + offset, truth)
    assert abs(plain.accuracy - changed.accuracy) < 0.03 and 0.5 < plain.accuracy < 1


def test_the_penalty_is_chosen_without_looking_at_the_queries():
    train, labels = blobs(100, spread=2.0)
    found = [linear_score(train, labels, *blobs(60, spread=2.0, seed=seed)) for seed in (1, 2)]
    flipped = linear_score(train, labels, -blobs(60)[0], blobs(60)[1])
    assert found[0].penalty == found[1].penalty == flipped.penalty
    assert found[0].held_out == flipped.held_out and flipped.accuracy < 0.34


def test_noise_features_ask_for_a_strong_penalty_and_clean_ones_do_not():
    """With more dimensions than images any labels can be fitted, so only the held-out part can tell."""
    generator = torch.Generator().manual_seed(3)
    train, labels = blobs(60, spread=0.5)
    noisy = torch.cat([train, torch.randn(60, 400, generator=generator)], dim=1)
    assert linear_score(noisy, labels, noisy, labels).penalty > linear_score(train, labels, train, labels).penalty / 10
    assert linear_score(train, labels, *blobs(60, spread=0.5, seed=1)).accuracy > 0.95


def test_two_fits_are_equal_to_the_bit():
    train, labels = blobs(80, spread=2.0)
    queries = blobs(50, spread=2.0, seed=5)
    assert linear_score(train, labels, *queries) == linear_score(train, labels, *queries)


def test_labels_need_not_be_0_to_n_and_one_never_seen_is_never_right():
    train, labels = blobs(90, spread=0.1)
    queries, truth = blobs(30, spread=0.1, seed=1)
    assert linear_score(train, labels * 1000 + 7, queries, truth * 1000 + 7).accuracy == 1.0
    assert linear_score(train, labels, queries, truth + 3).accuracy == 0.0


def test_every_class_of_sorted_data_is_held_out_and_kept():
    fit, held_out = linear._fifth(100, torch.device("cpu"))
    assert sorted(torch.cat([fit, held_out]).tolist()) == list(range(100)) and len(held_out) == 20
    assert len({row // 20 for row in held_out.tolist()}) == 5


@pytest.mark.parametrize(("train", "queries"), [(4, 3), (10, 0)])
def test_too_few_images_are_refused(train: int, queries: int):
    with pytest.raises(ValueError, match=f"at least 5 train images and a query, got {train} and {queries}"):
        linear_score(*blobs(train), *blobs(queries))
