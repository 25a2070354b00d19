"""Relative-position bias of a grid of patches with class token (Bao et al. 2021, "BEiT", after Raffel et al. 2019).

A table has (2h - 1)(2w - 1) + 3 rows, one per offset of two patches, row by row, and three for pairs with a token that
has no position: such a token asking a patch, a patch asking it, and two of them.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RelPosKind = Literal["none", "shared", "per_block", "both"]
SHARED: frozenset[RelPosKind] = frozenset({"shared", "both"})
PER_BLOCK: frozenset[RelPosKind] = frozenset({"per_block", "both"})
PREFIX_ROWS = 3


class RelPosBias(nn.Module):
    """The table that all blocks share, under the name that BEiT gives it."""

    def __init__(self, grid_size: tuple[int, int], num_heads: int):
        super().__init__()
        self.relative_position_bias_table = new_table(grid_size, num_heads)


def new_table(grid_size: tuple[int, int], num_heads: int) -> nn.Parameter:
    """A table of zeros [rows, heads], as BEiT starts."""
    return nn.Parameter(torch.zeros(num_rows(grid_size), num_heads))


def num_rows(grid_size: tuple[int, int]) -> int:
    return (2 * grid_size[0] - 1) * (2 * grid_size[1] - 1) + PREFIX_ROWS


def relative_index(grid_size: tuple[int, int], num_prefix: int, *, device: torch.device | None = None) -> Tensor:
    """The row of the table for each pair (asking token, asked token), int64 [P + N, P + N]."""
    grid_h, grid_w = grid_size
    rows = torch.arange(grid_h, device=device).repeat_interleave(grid_w)
    columns = torch.arange(grid_w, device=device).repeat(grid_h)
    down = rows[:, None] - rows + grid_h - 1
    right = columns[:, None] - columns + grid_w - 1
    last = num_rows(grid_size) - 1
    index = F.pad(down * (2 * grid_w - 1) + right, (num_prefix, 0, num_prefix, 0), value=last)
    index[:num_prefix, num_prefix:] = last - 2
    index[num_prefix:, :num_prefix] = last - 1
    return index


def bias_of(table: Tensor, index: Tensor) -> Tensor:
    """The additive bias of attention scores: rows of `table` by `index` [s, s] or [b, s, s] -> [1 or b, h, s, s]."""
    index = index if index.ndim == 3 else index[None]
    return F.embedding(index, table).permute(0, 3, 1, 2)


def keep_pairs(index: Tensor, tokens: Tensor) -> Tensor:
    """The pairs of `tokens` int64 [b, s] of an index [T, T] -> [b, s, s]."""
    return index[tokens[:, :, None], tokens[:, None, :]]


def resize_table(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """The table [rows, heads] of `old_grid` sampled (bicubic) on the offsets of `new_grid`; the last three rows stay.

    An offset keeps its share of the image: the same two places of a picture have the same bias at every resolution.

    Raises:
        ValueError: the table is not of `old_grid`.
    """
    if len(table) != num_rows(old_grid):
        raise ValueError(
            f"relative-position table has {len(table)} rows, its grid {old_grid[0]} x {old_grid[1]} needs "
            f"{num_rows(old_grid)}"
        )
    if new_grid == old_grid:
        return table
    old, new = ((2 * h - 1, 2 * w - 1) for h, w in (old_grid, new_grid))
    image = table[:-PREFIX_ROWS].T.reshape(1, -1, *old)
    image = F.interpolate(image, size=new, mode="bicubic", align_corners=False)
    return torch.cat([image.flatten(2)[0].T, table[-PREFIX_ROWS:]])


def crop_table(table: Tensor, grid: tuple[int, int], part: tuple[int, int]) -> Tensor:
    """The rows of a table [rows, heads] of `grid` for the offsets within a `part` of it, and the last three."""
    rows, columns = (slice(whole - size, whole + size - 1) for whole, size in zip(grid, part, strict=True))
    image = table[:-PREFIX_ROWS].unflatten(0, (2 * grid[0] - 1, 2 * grid[1] - 1))
    return torch.cat([image[rows, columns].flatten(0, 1), table[-PREFIX_ROWS:]])
