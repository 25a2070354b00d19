"""Weighted k-nearest-neighbour accuracy of frozen features (Wu et al. 2018, section 3.4; protocol of DINO).

Features are L2-normalized, similarity is the cosine, a neighbour's vote weighs exp(similarity / temperature).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def knn_accuracies(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, *, ks: Sequence[int], temperature: float = 0.07
) -> dict[int, float]:
    """For each k the share of `queries` [q, d] whose vote among the k nearest of `bank` [n, d] is their label.

    Labels are any int64 [n] and [q]; a k larger than the bank uses all of it. The neighbours are found once for all k.

    Raises:
        ValueError: one side is empty.
    """
    if not len(bank) or not len(queries):
        raise ValueError(f"the kNN probe needs labelled images: bank has {len(bank)}, queries {len(queries)}")
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    classes, targets = bank_labels.unique(return_inverse=True)
    correct = dict.fromkeys(ks, 0)
    for chunk, truth in zip(queries.split(1024), labels.split(1024), strict=True):
        similarity, nearest = (chunk @ bank.T).topk(min(max(ks), len(bank)), dim=1)
        # Relative to the nearest one, which changes no vote: exp(cosine / 0.01) is beyond fp32.
        weights, voted = ((similarity - similarity[:, :1]) / temperature).exp(), targets[nearest]
        for k in correct:
            votes = torch.zeros(len(chunk), len(classes), device=chunk.device)
            votes.scatter_add_(1, voted[:, :k], weights[:, :k])
            correct[k] += int((classes[votes.argmax(1)] == truth).sum())
    return {k: count / len(queries) for k, count in correct.items()}
