"""Rectangles on a grid of patches: placed as in BEiT, whose rule iBOT, DINOv2 and data2vec use; or one alone."""

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


def one_block(
    grid: tuple[int, int], number: int, aspect: tuple[float, float], numbers: Iterator[float], *, roll: bool
) -> np.ndarray:
    """Exactly `number` patches of one rectangle at a random place, bool [rows, columns] (Darcet et al. 2025, CAPI).

    Takes three uniform numbers: the height / width, log-uniform in the part of `aspect` that fits, and the position;
    with `roll` two more, for a shift around both edges. The sides are rounded up, the surplus is cut from the end.
    """
    rows, columns = grid
    low = max(math.log(aspect[0]), math.log(number / columns**2))
    high = min(math.log(aspect[1]), math.log(rows**2 / number))
    ratio = math.exp(low + (high - low) * next(numbers))
    height = min(max(math.ceil(math.sqrt(number * ratio)), math.ceil(number / columns)), rows)
    width = min(max(math.ceil(math.sqrt(number / ratio)), math.ceil(number / height)), columns)
    top, left = int(next(numbers) * (rows - height + 1)), int(next(numbers) * (columns - width + 1))
    mask = np.zeros(grid, bool)
    mask[top : top + height, left : left + width] = True
    mask[np.unravel_index(np.flatnonzero(mask)[number:], grid)] = False
    if roll:
        mask = np.roll(mask, (int(next(numbers) * rows), int(next(numbers) * columns)), axis=(0, 1))
    return mask


def fill_up(mask: np.ndarray, number: int, ranks: np.ndarray) -> np.ndarray:
    """Exactly `number` True per row of `mask` bool [..., N]: removes or adds entries, lowest ranks in [0, 1) first."""
    order = np.argsort(np.where(mask, ranks, 1 + ranks), axis=-1, kind="stable")
    filled = np.zeros_like(mask)
    np.put_along_axis(filled, order[..., :number], True, axis=-1)
    return filled
