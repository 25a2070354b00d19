"""Rotary positions whose frequencies are weights of each attention, as CAPI uses them (Darcet et al. 2025).

Coordinates of rows and columns are in [0, 1]. Tokens without a place in the image stand at equal distances on the
border of the box around the patches that are present.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class FreeRope(nn.Module):
    """Coordinates of tokens -> sines and cosines for `rope.rotate`.

    Parameter `freqs` [2, head_dim], in radians per side of the image: rows turn the first half of the channels,
    columns the second, each by head_dim / 4 geometric frequencies twice. As in the official code a pair of channels
    that `rotate` mixes has one of either half. It is fixed, and kept in the state, until someone trains it.

    Args:
        frequencies: the lowest and the highest, in turns per side.
    """

    def __init__(self, head_dim: int, frequencies: tuple[float, float]):
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"head dimension {head_dim} is not a multiple of 4, which rotary positions need")
        lowest, highest = frequencies
        geometric = highest * (lowest / highest) ** torch.linspace(0, 1, head_dim // 4)
        freqs = torch.block_diag(geometric.tile(2)[None], geometric.tile(2)[None]) * (2 * math.pi)
        self.freqs = nn.Parameter(freqs, requires_grad=False)

    def forward(self, places: Tensor) -> Tensor:
        """Coordinates [1, 1 or b, 1, s, 2] -> fp32 [2, 1 or b, 1, s, head_dim]."""
        with torch.autocast(places.device.type, enabled=False):
            angles = places[0] @ self.freqs.float()
        return torch.stack([angles.sin(), angles.cos()])


def border(count: int, *, device: torch.device | None = None) -> Tensor:
    """`count` places [count, 2] at equal distances on the border of the unit square, from (0, 0) by (1, 0) around."""
    way = 4 * torch.arange(count, device=device, dtype=torch.float32) / max(count, 1)
    return torch.stack([torch.minimum(way, 3 - way), torch.minimum(way - 1, 4 - way)], dim=-1).clamp(0, 1)


def coordinates(
    grid: tuple[int, int],
    num_prefix: int,
    *,
    extra: int = 0,
    keep: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Places of all tokens, fp32 [1, 1 or b, 1, extra + P + N, 2], in the layout of the tables of `rope`.

    Args:
        num_prefix: P tokens on the border around the patches.
        extra: tokens before them, which stay unrotated.
        keep: int64 [b, k]: only these patches are present; k replaces N.
    """
    patches = _patches(grid, device)[None]
    patches = patches if keep is None else patches[0][keep]
    low, high = patches.amin(dim=1, keepdim=True), patches.amax(dim=1, keepdim=True)
    prefix = low + border(num_prefix, device=device) * (high - low)
    unrotated = patches.new_zeros(len(patches), extra, 2)
    return torch.cat([unrotated, prefix, patches], dim=1)[None, :, None]


def _patches(grid: tuple[int, int], device: torch.device | None) -> Tensor:
    """Row and column of every patch, [N, 2] in [0, 1]."""
    lines = [torch.arange(n, device=device, dtype=torch.float32) / max(n - 1, 1) for n in grid]
    return torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1).flatten(0, 1)
