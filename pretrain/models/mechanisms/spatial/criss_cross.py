"""Criss-cross attention (Huang et al. 2019, "CCNet: Criss-Cross Attention for Semantic Segmentation", section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.models.mechanisms.contract import MapMechanism


class CrissCross(MapMechanism):
    """x + gamma * attention of each place over its row and its column, `recurrence` times with the same weights.

    One softmax over H + W - 1 places, the place itself once; scores are not scaled by the width. Two passes let every
    place read every other. gamma starts at 0: the identity. It reads the grid.

    Args:
        dim: C. inner_dim: channels of queries and keys; None: C / 8.
    """

    starts_as_identity = True

    def __init__(self, dim: int, *, inner_dim: int | None = None, recurrence: int = 2):
        super().__init__()
        if recurrence < 1:
            raise ValueError(f"recurrence must be at least 1, got {recurrence}")
        inner = max(dim // 8, 1) if inner_dim is None else inner_dim
        self.recurrence = recurrence
        self.query, self.key, self.value = nn.Conv2d(dim, inner, 1), nn.Conv2d(dim, inner, 1), nn.Conv2d(dim, dim, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.recurrence):
            x = self.once(x)
        return x

    def once(self, x: Tensor) -> Tensor:
        """One pass."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        rows = x.shape[2]
        column = torch.einsum("bchw,bcgw->bhwg", q, k)
        itself = torch.eye(rows, dtype=torch.bool, device=x.device)[:, None]  # it is in the row
        column = column.masked_fill(itself, float("-inf"))
        row = torch.einsum("bchw,bchv->bhwv", q, k)
        weights = torch.cat([column, row], dim=3).softmax(dim=3).to(v.dtype)
        out = torch.einsum("bhwg,bcgw->bchw", weights[..., :rows], v)
        out = out + torch.einsum("bhwv,bchv->bchw", weights[..., rows:], v)
        return x + self.gamma * out
