"""The kNN probe is the weighted vote of Wu et al. 2018."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.probes.knn import knn_accuracies


def vote(bank: np.ndarray, bank_labels: np.ndarray, query: np.ndarray, k: int, temperature: float) -> int:
    """One query, written with loops."""
    similarity = [float(row @ query / np.linalg.norm(row) / np.linalg.norm(query)) for row in bank]
    nearest = sorted(range(len(bank)), key=lambda i: -similarity[i])[:k]
    votes: dict[int, float] = {}
    for i in nearest:
        votes[int(bank_labels[i])] = votes.get(int(bank_labels[i]), 0.0) + np.exp(similarity[i] / temperature)
    return max(votes, key=lambda label: votes[label])


@given(st.integers(0, 10_000), st.integers(1, 30), st.sampled_from([0.005, 0.07, 0.5]))
@settings(max_examples=30, deadline=None)
def test_the_accuracy_is_that_of_the_vote_written_with_loops(seed: int, k: int, temperature: float):
    random = np.random.default_rng(seed)
    bank, queries = random.normal(size=(25, 6)), random.normal(size=(9, 6))
    bank_labels, labels = random.integers(0, 4, 25), random.integers(0, 4, 9)
    expected = np.mean([vote(bank, bank_labels, q, k, temperature) == t for q, t in zip(queries, labels, strict=True)])
    tensors = [torch.from_numpy(array) for array in (bank, bank_labels, queries, labels)]
    assert knn_accuracies(*tensors, ks=(k, 1), temperature=temperature)[k] == pytest.approx(expected)


def test_the_length_of_a_feature_does_not_matter():
    features, labels = torch.randn(40, 8), torch.arange(40) % 3
    scaled = features * torch.rand(40, 1).add(0.1)
    assert knn_accuracies(features, labels, scaled, labels, ks=(1,)) == {1: 1.0}


def test_an_empty_side_is_a_clear_error():
    with pytest.raises(ValueError, match="bank has 0, queries 3"):
        knn_accuracies(torch.zeros(0, 2), torch.zeros(0).long(), torch.ones(3, 2), torch.zeros(3).long(), ks=(1,))


@pytest.mark.parametrize("strange", [-1, 10**12])
def test_a_label_may_be_any_integer(strange: int):
    features, labels = torch.eye(4).repeat(3, 1), torch.tensor([0, strange, 7, 2]).repeat(3)
    assert knn_accuracies(features, labels, features, labels, ks=(1, 3)) == {1: 1.0, 3: 1.0}
    assert knn_accuracies(features, labels, features[:1], torch.tensor([5]), ks=(1,)) == {1: 0.0}, "nobody has it"
