"""Weighted k-nearest-neighbour accuracy of frozen features (Wu et al. 2018, section 3.4; protocol of DINO).

Features are L2-normalized, similarity is the cosine, a neighbour votes with exp(similarity / temperature).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain import distributed

Features = dict[str, Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]


@torch.no_grad()
def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, *, k: int = 20, temperature: float = 0.07
) -> float:
    """Share of `queries` [q, d] whose vote among the k nearest of `bank` [n, d] is their label.

    Labels are int64 [n] and [q]; k is lowered to n when the bank is smaller.
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


@torch.no_grad()
def vit_features(backbone: nn.Module, images: Tensor) -> Features:
    """The two usual summaries of a ViT: its [CLS] token and the mean of its patch tokens, each [b, d]."""
    tokens = backbone(images).float()
    return {"cls": tokens[:, 0], "patch_mean": tokens[:, backbone.num_prefix_tokens :].mean(1)}  # type: ignore[index]


def pixel_features(images: Tensor) -> Features:
    """Raw normalized pixels [b, c*h*w]: what a probe reads without any network."""
    return {"pixels": images.float().flatten(1)}


def collect(batches: Batches, features: Callable[[Tensor], Features], device: torch.device) -> tuple[Features, Tensor]:
    """Run `features` over this rank's batches and gather those of all ranks: name -> [n, d], labels [n]."""
    rows: dict[str, list[Tensor]] = {}
    labels: list[Tensor] = []
    for images, truth in batches:
        labels.append(truth)
        for name, value in features(images.to(device, non_blocking=True)).items():
            rows.setdefault(name, []).append(value.cpu())
    mine = ({name: torch.cat(parts) for name, parts in rows.items()}, torch.cat(labels) if labels else torch.empty(0))
    shares = [share for share in distributed.all_gather_object(mine) if len(share[1])]
    if not shares:
        raise ValueError("the kNN probe found no labelled image; shards need a .cls member per sample")
    gathered = {name: torch.cat([share[0][name] for share in shares]) for name in shares[0][0]}
    return gathered, torch.cat([share[1] for share in shares])


def probe(
    bank: Batches,
    queries: Batches,
    features: Callable[[Tensor], Features],
    *,
    device: torch.device,
    k: int = 20,
    temperature: float = 0.07,
) -> Mapping[str, float]:
    """kNN accuracy of each kind of feature: {"cls": 0.41, "patch_mean": 0.44}.

    Pixels are centred by the mean of the bank, as a raw-pixel baseline should be.
    """
    bank_features, bank_labels = collect(bank, features, device)
    query_features, labels = collect(queries, features, device)
    scores = {}
    for name, stored in bank_features.items():
        centre = stored.mean(0) if name == "pixels" else torch.zeros(())
        asked = query_features[name] - centre
        scores[name] = knn_accuracy(stored - centre, bank_labels, asked, labels, k=k, temperature=temperature)
    return scores
