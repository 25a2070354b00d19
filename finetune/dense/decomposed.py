"""Decomposed relative positions (Li et al. 2021, "MViTv2", section 4.1), as ViTDet adds them when it fine-tunes.

A query q at (y, x) gives the key at (y', x') the score q . R_h[y - y'] + q . R_w[x - x'], in addition to
q . k / sqrt(d); the heads share R_h and R_w. Tables start at zero: at first they change nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def add_tables(attention: nn.Module, sizes: tuple[int, int]) -> None:
    """Give an attention its tables rel_pos_h and rel_pos_w, [2 * size - 1, head dimension], for grids of
    `sizes` = (rows, columns).

    The names are those of ViTDet; existing tables are kept.
    """
    for name, size in zip(("rel_pos_h", "rel_pos_w"), sizes, strict=True):
        if not hasattr(attention, name):
            weight = next(attention.parameters())
            table = torch.zeros(2 * size - 1, int(attention.head_dim), device=weight.device)  # type: ignore[arg-type]
            attention.register_parameter(name, nn.Parameter(table))


def scores(
    queries: Tensor, tables: tuple[Tensor, Tensor], grid: tuple[int, int], *, num_prefix: int, crop: bool
) -> Tensor:
    """The bias [b, h, P + N, P + N] of the scores of queries [b, h, P + N, d] on a grid of N patches.

    The `num_prefix` tokens have no position: their rows and columns are 0.

    Args:
        tables: of rows and columns, [2 * size - 1, d]. crop: for another grid than theirs, use the part of
            them with its offsets (a smaller window); else resample them linearly (another image size).
    """
    down, right = (along(table, size, crop=crop) for table, size in zip(tables, grid, strict=True))
    q = queries[:, :, num_prefix:].unflatten(2, grid)
    # Summed in the dtype of the products, which autocast decides, not of the tables.
    by_row = torch.einsum("bhyxd,ykd->bhyxk", q, down.to(q.dtype))
    by_column = torch.einsum("bhyxd,xkd->bhyxk", q, right.to(q.dtype))
    added = by_row[..., :, None] + by_column[..., None, :]
    added = added.flatten(4).flatten(2, 3)
    return F.pad(added, (num_prefix, 0, num_prefix, 0))


def along(table: Tensor, size: int, *, crop: bool) -> Tensor:
    """The rows of a table [2 * n - 1, d] for every pair (query, key) of an axis of `size` patches, [size, size, d].

    Raises:
        ValueError: `crop` needs more offsets than the table has.
    """
    rows, wanted = len(table), 2 * size - 1
    if wanted > rows and crop:
        raise ValueError(f"relative positions of {rows} offsets do not cover {size} patches")
    if crop:
        table = table[(rows - wanted) // 2 : (rows + wanted) // 2]
    elif rows != wanted:
        table = F.interpolate(table.T[None], size=wanted, mode="linear", align_corners=False)[0].T
    places = torch.arange(size, device=table.device)
    return table[places[:, None] - places + size - 1]
