"""Position tables: fixed 2-D sin-cos (He et al. 2021, as MAE orders its channels) and resizing to another grid.

A table is [1, 1 + N, D]: row 0 belongs to the class token, row 1 + y * grid_w + x to patch (y, x).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

PosResize = Literal["exact", "dino"]


def sincos_2d(embed_dim: int, grid_size: tuple[int, int], *, cls_row: bool = True) -> Tensor:
    """Fixed position table, float64 [1 + N, D] ([N, D] without the zero class row).

    The first half of the channels encodes the column, the second the row; each half is [sin | cos] of
    position / 10000^(i / (D / 4)).

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
    angles = [axis.reshape(-1, 1) * rates for axis in (columns, rows)]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([table.new_zeros(1, embed_dim), table]) if cls_row else table


def resize(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], *, how: PosResize = "exact") -> Tensor:
    """The table [1, 1 + N, D] of `old_grid` sampled (bicubic) on `new_grid`; the class row is kept.

    Args:
        how: "exact" asks for the new size (MAE); "dino" asks for the scale factor (new + 0.1) / old, whose sampling
            grid differs slightly: DINO's released weights were trained with it.
    """
    if new_grid == old_grid:
        return table
    cls_row, patches = table[:, :1], table[:, 1:]
    if patches.shape[1] != old_grid[0] * old_grid[1]:
        raise ValueError(
            f"position table has {patches.shape[1]} patch rows, its grid {old_grid[0]} x {old_grid[1]} needs "
            f"{old_grid[0] * old_grid[1]}"
        )
    image = patches.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    if how == "exact":
        image = F.interpolate(image, size=new_grid, mode="bicubic", align_corners=False)
    else:
        scale = ((new_grid[0] + 0.1) / old_grid[0], (new_grid[1] + 0.1) / old_grid[1])
        image = F.interpolate(image, scale_factor=scale, mode="bicubic", align_corners=False)
        assert image.shape[-2:] == new_grid, f"scale factor gave {tuple(image.shape[-2:])}, expected {new_grid}"
    return torch.cat([cls_row, image.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
