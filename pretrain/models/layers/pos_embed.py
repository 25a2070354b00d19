"""Position tables: fixed 2-D sin-cos, in the two orders of channels that are in use, 1-D sin-cos of clips, and resizing
to another grid.

A table is [1, P + N, D]: with a class row (P = 1) row 0 belongs to the class token; row P + y * grid_w + x belongs to
patch (y, x).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

PosKind = Literal["sincos", "sincos_rows_first", "sincos_flat", "learned", "rope", "none"]
PosResize = Literal["exact", "dino", "antialias", "dino_antialias"]
DINO_OFFSET = 0.1


def sincos_2d(embed_dim: int, grid_size: tuple[int, int], *, cls_row: bool = True, rows_first: bool = False) -> Tensor:
    """Fixed position table, float64 [1 + N, D] ([N, D] without the zero class row).

    One half of the channels encodes the column, the other the row; each half is [sin | cos] of
    position / 10000^(i / (D / 4)). The column comes first (MAE, I-JEPA), or with `rows_first` the row (MoCo v3).

    Raises:
        ValueError: `embed_dim` is not a multiple of 4.
    """
    if embed_dim % 4:
        raise ValueError(f"embed_dim {embed_dim} is not a multiple of 4, which a 2-D sin-cos position table needs")
    grid_h, grid_w = grid_size
    rates = 10000.0 ** -(torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim / 4))
    rows, columns = torch.meshgrid(
        torch.arange(grid_h, dtype=torch.float64), torch.arange(grid_w, dtype=torch.float64), indexing="ij"
    )
    angles = [axis.reshape(-1, 1) * rates for axis in ((rows, columns) if rows_first else (columns, rows))]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([table.new_zeros(1, embed_dim), table]) if cls_row else table


def sincos_flat(embed_dim: int, num_tokens: int) -> Tensor:
    """Fixed table of the tokens' numbers, whatever their grid, float64 [N, D].

    Channels 2i and 2i + 1 are sin and cos of number / 10000^(2i / D). VideoMAE (Tong et al. 2022) has it for tokens in
    the order time, row, column.

    Raises:
        ValueError: `embed_dim` is odd.
    """
    if embed_dim % 2:
        raise ValueError(f"embed_dim {embed_dim} is odd: a sin-cos table needs pairs of channels")
    rates = 10000.0 ** -(torch.arange(0, embed_dim, 2, dtype=torch.float64) / embed_dim)
    angles = torch.arange(num_tokens, dtype=torch.float64)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def resize(
    table: Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    *,
    how: PosResize = "exact",
    offset: float = DINO_OFFSET,
) -> Tensor:
    """The table [1, P + N, D] of `old_grid` sampled (bicubic) on `new_grid`; a class row is kept.

    Args:
        how: "exact" asks for the new size (MAE); "dino" asks for the scale factor (new + offset) / old, whose sampling
            grid differs slightly: the released weights of DINO, iBOT and DINOv2 were trained with it. "antialias" and
            "dino_antialias" smooth as well when the grid shrinks; DINOv2 with registers has "antialias".

    Raises:
        ValueError: the table is not of `old_grid`.
    """
    if new_grid == old_grid:
        return table
    return resample(table, old_grid, new_grid, how=how, offset=offset)


def resample(
    table: Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    *,
    how: PosResize = "exact",
    offset: float = DINO_OFFSET,
) -> Tensor:
    """`resize` without its shortcut for the same grid, so that it also traces for a grid that is not known yet."""
    prefix = table.shape[1] - old_grid[0] * old_grid[1]
    if prefix not in (0, 1):
        raise ValueError(
            f"position table has {table.shape[1] - 1} patch rows, its grid {old_grid[0]} x {old_grid[1]} needs "
            f"{old_grid[0] * old_grid[1]}"
        )
    image = table[:, prefix:].reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    antialias = how.endswith("antialias")
    if how.startswith("dino"):
        scale = ((new_grid[0] + offset) / old_grid[0], (new_grid[1] + offset) / old_grid[1])
        image = F.interpolate(image, scale_factor=scale, mode="bicubic", align_corners=False, antialias=antialias)
        assert image.shape[-2:] == new_grid, f"scale factor gave {tuple(image.shape[-2:])}, expected {new_grid}"
    else:
        image = F.interpolate(image, size=new_grid, mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([table[:, :prefix], image.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
