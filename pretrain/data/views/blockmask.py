"""Rectangles on a grid of patches, placed as in BEiT; iBOT, DINOv2 and data2vec use the same rule."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

_TRIES = 10
Block = tuple[int, int, int, int]


def place_blocks(
    grid: tuple[int, int], goal: float, smallest: float, largest: float, min_aspect: float, numbers: Iterator[float]
) -> tuple[np.ndarray, list[Block]]:
    """Cover at most `goal` patches with rectangles: mask bool [rows, columns], blocks (top, left, height, width).

    Each try takes four uniform numbers: an area in [smallest, patches still to cover] (in either
    order), a log-uniform aspect height / width, and the position. A block is kept if it is lower and narrower than the
    grid and covers at least 1 new patch, and at most those still to cover and `largest`. Ten failures end it.
    """
    rows, columns = grid
    log_aspect = math.log(min_aspect)
    mask, blocks, covered = np.zeros(grid, dtype=bool), [], 0
    while covered < goal:
        room = min(goal - covered, largest)
        for _ in range(_TRIES):
            area = smallest + (room - smallest) * next(numbers)
            aspect = math.exp(log_aspect - 2 * log_aspect * next(numbers))
            at_row, at_column = next(numbers), next(numbers)
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= rows or width >= columns:
                continue
            top, left = int(at_row * (rows - height + 1)), int(at_column * (columns - width + 1))
            window = mask[top : top + height, left : left + width]
            new = height * width - int(window.sum())
            if 0 < new <= room:
                window[:] = True
                blocks.append((top, left, height, width))
                covered += new
                break
        else:
            break
    return mask, blocks


def fill_up(mask: np.ndarray, number: int, ranks: np.ndarray) -> np.ndarray:
    """Exactly `number` True per row of `mask` bool [..., N]: removes or adds entries, lowest ranks in [0, 1) first."""
    order = np.argsort(np.where(mask, ranks, 1 + ranks), axis=-1, kind="stable")
    filled = np.zeros_like(mask)
    np.put_along_axis(filled, order[..., :number], True, axis=-1)
    return filled
