"""The attentive probe: a learned query attends to the patches of a frozen network, before a linear classifier.

El-Nouby et al. 2024 ("AIM", section 4): information of a network may be in its patches rather than in their mean.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.heads.pooled.linear import classifier
from pretrain.models.backbones.contract import Backbone

HEAD_DIM = 64


class AttentiveHead(nn.Module):
    """Images through a backbone to logits [b, K].

    Args:
        num_heads: of the attention; None: one per 64 channels. num_queries: results of several are averaged.

    Raises:
        ValueError: the backbone gives no patches, or the heads do not divide its width.
    """

    def __init__(self, backbone: Backbone, num_classes: int, *, num_heads: int | None, num_queries: int, std: float):
        super().__init__()
        dim = backbone.embed_dim
        if "patches" not in backbone.provides:
            raise ValueError("task.train: attentive, but the backbone gives one vector for an image, no patches")
        self.num_heads = num_heads or max(1, dim // HEAD_DIM)
        if dim % self.num_heads:
            raise ValueError(f"task.attention_heads: {self.num_heads} do not divide the backbone's width {dim}")
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.query = nn.Parameter(torch.empty(1, num_queries, dim))
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.fc = classifier(dim, num_classes, std=std)
        nn.init.trunc_normal_(self.query, std=0.02)
        nn.init.trunc_normal_(self.kv.weight, std=0.02)

    def forward(self, backbone: Backbone, images: Tensor, drop: Tensor | None = None) -> Tensor:
        return self.fc(self.attend(backbone(images, drop=drop)[:, backbone.num_prefix_tokens :]))

    def attend(self, patches: Tensor) -> Tensor:
        """[b, N, D] -> [b, D]."""
        k, v = self.kv(self.norm(patches)).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q = self.query.unflatten(2, (self.num_heads, -1)).transpose(1, 2).expand(patches.shape[0], -1, -1, -1)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(dim=1)
