"""Weighted k-nearest-neighbour accuracy of frozen features (Wu et al. 2018, section 3.4; protocol of DINO).

Features are L2-normalized, similarity is the cosine, a neighbour votes with exp(similarity / temperature).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, *, k: int = 20, temperature: float = 0.07
) -> float:
    """Share of `queries` [q, d] whose vote among the k nearest of `bank` [n, d] is their label.

    Labels are int64 [n] and [q]; k is lowered to n when the bank is smaller.

    Raises:
        ValueError: one side is empty.
    """
    if not len(bank) or not len(queries):
        raise ValueError(f"the kNN probe needs labelled images: bank has {len(bank)}, queries {len(queries)}")
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    num_classes = int(max(bank_labels.max(), labels.max())) + 1
    correct = 0
    for chunk, truth in zip(queries.split(1024), labels.split(1024), strict=True):
        similarity, nearest = (chunk @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(chunk), num_classes, device=chunk.device)
        votes.scatter_add_(1, bank_labels[nearest], (similarity / temperature).exp())
        correct += int((votes.argmax(1) == truth).sum())
    return correct / len(queries)
