"""Windows of a grid of tokens: each attends within itself (Li et al. 2022, "ViTDet", section 3).

The tokens without a position (class token, registers, queries) are copied into every window and averaged afterwards, so
that a window as large as the grid is plain attention. Windows that extend beyond the grid are filled with empty places,
to which no token may attend.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def fit(grid: tuple[int, int], window: int) -> tuple[int, int]:
    """(rows, columns) of windows of at most `window` on a grid that may be smaller."""
    return min(window, grid[0]), min(window, grid[1])


def count(grid: tuple[int, int], window: tuple[int, int]) -> int:
    """Number of windows that cover the grid."""
    return math.ceil(grid[0] / window[0]) * math.ceil(grid[1] / window[1])


def split(x: Tensor, grid: tuple[int, int], window: tuple[int, int], *, num_prefix: int = 0) -> Tensor:
    """Tokens [b, P + N, D] of a grid, row by row -> their windows [b * n, P + s, D], those of an image together."""
    prefix, patches = x[:, :num_prefix], x[:, num_prefix:]
    (rows, columns), (high, wide) = grid, window
    image = patches.unflatten(1, grid)
    image = F.pad(image, (0, 0, 0, -columns % wide, 0, -rows % high))
    tiles = image.unflatten(2, (-1, wide)).unflatten(1, (-1, high)).transpose(2, 3)
    tiles = tiles.flatten(3, 4).flatten(1, 2)
    copies = prefix[:, None].expand(-1, tiles.shape[1], -1, -1)
    return torch.cat([copies, tiles], dim=2).flatten(0, 1)


def join(x: Tensor, grid: tuple[int, int], window: tuple[int, int], *, num_prefix: int = 0) -> Tensor:
    """The inverse of `split`: windows [b * n, P + s, D] -> tokens [b, P + N, D]; copies of the prefix are averaged."""
    tiles = x.unflatten(0, (-1, count(grid, window)))
    prefix, patches = tiles[:, :, :num_prefix].mean(1), tiles[:, :, num_prefix:]
    across = math.ceil(grid[1] / window[1])
    image = patches.unflatten(2, window).unflatten(1, (-1, across)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return torch.cat([prefix, image[:, : grid[0], : grid[1]].flatten(1, 2)], dim=1)


def empty_places(
    grid: tuple[int, int], window: tuple[int, int], *, num_prefix: int = 0, device: torch.device | None = None
) -> Tensor | None:
    """True at the places beyond the grid, bool [n, P + s]; None if there are none."""
    if grid[0] % window[0] == 0 and grid[1] % window[1] == 0:
        return None
    filled = torch.ones(1, num_prefix + grid[0] * grid[1], 1, device=device)
    return split(filled, grid, window, num_prefix=num_prefix)[:, :, 0] == 0


def hide_keys(scores: Tensor, hidden: Tensor) -> Tensor:
    """Attention scores (or what is added to them) with -inf at the keys that are `hidden`, bool, broadcast together."""
    return scores.masked_fill(hidden, -torch.inf)
