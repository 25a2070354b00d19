"""InfoNCE (van den Oord et al. 2018), scaled as in MoCo v3."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.core import distributed


def contrastive_loss(query: Tensor, key: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of identifying each query's key among the keys of all ranks, times 2 * temperature, in fp32.

    Row i of `query` [b, D] belongs to row i of `key` [b, D]; the other keys, of this batch on every rank, are the
    negatives (Chen et al. 2021, algorithm 1). Keys get no gradient. Every rank must have the same number of rows.

    Returns:
        the loss (a mean over the queries), and the fraction of queries whose key is the nearest one.
    """
    with torch.autocast(query.device.type, enabled=False):
        query, key = F.normalize(query.float(), dim=1), F.normalize(key.detach().float(), dim=1)
        logits = query @ distributed.all_gather(key).T / temperature
        labels = torch.arange(len(query), device=query.device) + len(query) * distributed.rank()
        loss = F.cross_entropy(logits, labels) * (2 * temperature)
    return loss, (logits.detach().argmax(dim=1) == labels).float().mean()
