"""Rotary positions of a grid of patches (Su et al. 2021), axial and normalized as DINOv3 uses them (section 3.2).

Rows and columns are mapped to [-1, 1] each, so that another grid is another sampling of the same square and nothing
has to be resampled. DINOv3's random shifts and scales of the coordinates in training are not implemented.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BASE = 100.0


def rope_table(
    grid_size: tuple[int, int], head_dim: int, *, num_prefix: int = 0, device: torch.device | None = None
) -> Tensor:
    """Sines and cosines, fp32 [2, 1, 1, P + N, head_dim]; the `num_prefix` tokens have no position and stay unrotated.

    Raises:
        ValueError: `head_dim` is not a multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"head dimension {head_dim} is not a multiple of 4, which rotary positions need")
    rates = BASE ** -(torch.arange(head_dim // 4, device=device, dtype=torch.float32) / (head_dim // 4))
    axes = [(torch.arange(n, device=device, dtype=torch.float32) + 0.5) / n * 2 - 1 for n in grid_size]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
    angles = (2 * math.pi * places[:, :, None] * rates).flatten(1).tile(2)
    angles = torch.cat([angles.new_zeros(num_prefix, head_dim), angles])
    return torch.stack([angles.sin(), angles.cos()])[:, None, None]


def keep_tokens(table: Tensor, tokens: Tensor) -> Tensor:
    """The rows of `tokens` int64 [b, s] of a table [2, 1, 1, P + N, d] -> [2, b, 1, s, d]."""
    return table[:, 0, 0][:, tokens][:, :, None]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Queries or keys [b, h, s, d] rotated by their positions; computed in fp32, returned in the type of x."""
    sin, cos = table
    low, high = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-high, low], dim=-1) * sin).to(x.dtype)
