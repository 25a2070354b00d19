"""Weighted k-nearest-neighbour accuracy of frozen features (Wu et al. 2018, section 3.4; protocol of DINO).

Features are L2-normalized, similarity is the cosine, a neighbour's vote weighs exp(similarity / temperature).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 1024  # queries at a time


@torch.no_grad()
def knn_accuracies(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, *, ks: Sequence[int], temperature: float = 0.07
) -> dict[int, float]:
    """For each k the share of `queries` [q, d] whose vote among the k nearest of `bank` [n, d] is their label.

    Labels are any int64 [n] and [q]; a k larger than the bank uses all of it. The neighbours are found once for all k.

    Raises:
        ValueError: one side is empty.
    """
    right = knn_correct(bank, bank_labels, queries, labels, ks=ks, temperature=temperature)
    return {k: int(correct.sum()) / len(queries) for k, correct in right.items()}


@torch.no_grad()
def knn_correct(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    *,
    ks: Sequence[int],
    temperature: float = 0.07,
    leave_one_out: bool = False,
) -> dict[int, Tensor]:
    """For each k whether the vote of the k nearest is the label of a query, bool [q].

    Args:
        leave_one_out: `queries` are `bank`, and none is its own neighbour.

    Raises:
        ValueError: one side is empty.
    """
    if not len(bank) or not len(queries):
        raise ValueError(f"the kNN probe needs labelled images: bank has {len(bank)}, queries {len(queries)}")
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    classes, targets = bank_labels.unique(return_inverse=True)
    correct: dict[int, list[Tensor]] = {k: [] for k in ks}
    for number, (chunk, truth) in enumerate(zip(queries.split(_CHUNK), labels.split(_CHUNK), strict=True)):
        similar = chunk @ bank.T
        if leave_one_out:
            similar.diagonal(number * _CHUNK).fill_(-torch.inf)
        similarity, nearest = similar.topk(min(max(ks), len(bank) - leave_one_out), dim=1)
        # Relative to the nearest one, which changes no vote: exp(cosine / 0.01) is beyond fp32.
        weights, voted = ((similarity - similarity[:, :1]) / temperature).exp(), targets[nearest]
        for k in correct:
            votes = torch.zeros(len(chunk), len(classes), device=chunk.device)
            votes.scatter_add_(1, voted[:, :k], weights[:, :k])
            correct[k].append(classes[votes.argmax(1)] == truth)
    return {k: torch.cat(found) for k, found in correct.items()}
