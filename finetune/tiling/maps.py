"""Maps of an image from those of its tiles: outputs are averaged where tiles overlap, then a map is read from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from finetune.tasks.sliding import cover


def averaged_rows(
    size: tuple[int, int], tops: Sequence[int], lefts: Sequence[int], tile: tuple[int, int], scores: Iterator[Tensor]
) -> Iterator[Tensor]:
    """The means [K, r, W] of an image of `size`, (height, width), from above, as soon as no later tile covers them.

    No more than a row of tiles is held: all outputs of a large image would not fit in memory.

    Args:
        tops, lefts: of the rows and columns of tiles of `tile`, (height, width).
        scores: of the tiles, row by row, [K, height, width] each.
    """
    height, width = tile
    down, across = cover(tops, height, size[0]), cover(lefts, width, size[1])
    before: Tensor | None = None
    for number, top in enumerate(tops):
        band: Tensor | None = None
        for left in lefts:
            found = next(scores).cpu()
            if band is None:
                band = torch.zeros(len(found), height, size[1])
            band[:, :, left : left + width] += found
        assert band is not None
        if before is not None:
            band[:, : before.shape[1]] += before
        end = tops[number + 1] if number + 1 < len(tops) else top + height
        yield band[:, : end - top] / (down[top:end, None] * across)
        before = band[:, end - top :]
