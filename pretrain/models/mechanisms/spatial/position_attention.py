"""Position attention of DANet (Fu et al. 2019, "Dual Attention Network for Scene Segmentation", section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.mechanisms.contract import MapMechanism
from pretrain.models.mechanisms.spatial.places import pointwise


class PositionAttention(MapMechanism):
    """x + gamma * attention(x): one head over all places, its scores not scaled by the width.

    gamma starts at 0: the identity. It reads a set of places.

    Args:
        dim: C. inner_dim: channels of queries and keys; None: C / 8.
    """

    starts_as_identity = True

    def __init__(self, dim: int, *, inner_dim: int | None = None):
        super().__init__()
        inner = max(dim // 8, 1) if inner_dim is None else inner_dim
        self.query, self.key, self.value = pointwise(dim, inner), pointwise(dim, inner), pointwise(dim, dim)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        q, k, v = (layer(flat).transpose(1, 2)[:, None] for layer in (self.query, self.key, self.value))
        out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return x + self.gamma * out[:, 0].transpose(1, 2).reshape(x.shape)
