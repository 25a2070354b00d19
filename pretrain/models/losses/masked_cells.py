"""Masks of square cells of pixels, larger or smaller than a token (Xie et al. 2021, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskedCells:
    """The masked cells of each image, converted for the encoder and the loss.

    Attributes:
        masked: int64 [b, k], row-major indices of the masked cells, each once.
        size: (height, width) of the images. cell: side of a cell. patch: side of one token at the encoder's
            output. All in pixels; one side of cell and patch divides the other.
    """

    masked: Tensor
    size: tuple[int, int]
    cell: int
    patch: int

    @property
    def num_masked_pixels(self) -> int:
        """Number of masked pixels in all images of the batch."""
        return self.masked.numel() * self.cell**2

    def for_encoder(self) -> Tensor:
        """bool [b, n]: mask of tokens, or of cells if these are smaller."""
        grid = self._cells()
        return (_enlarged(grid, self.cell // self.patch) if self.cell > self.patch else grid).flatten(1)

    def pixels(self) -> Tensor:
        """Mask of pixels, bool [b, H, W]."""
        return _enlarged(self._cells(), self.cell)

    def tokens_to_decode(self) -> Tensor | None:
        """int64 [b, t]: indices of masked tokens, if no token can be masked in part; else None: all tokens."""
        if self.cell < self.patch:
            return None
        per_cell, columns = self.cell // self.patch, self.size[1] // self.cell
        inside = torch.arange(per_cell, device=self.masked.device)
        down = (self.masked // columns)[..., None, None] * per_cell + inside[:, None]
        right = (self.masked % columns)[..., None, None] * per_cell + inside
        return (down * (columns * per_cell) + right).flatten(1)

    def pixels_of_tokens(self) -> Tensor | None:
        """bool [b, N, patch * patch], True for masked pixels, if tokens can be masked in part; else None."""
        if self.cell >= self.patch:
            return None
        rows, columns = (side // self.patch for side in self.size)
        split = self.pixels().unflatten(1, (rows, self.patch)).unflatten(3, (columns, self.patch))
        return split.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)

    def _cells(self) -> Tensor:
        """Mask of cells, bool [b, rows, columns]."""
        rows, columns = self.size[0] // self.cell, self.size[1] // self.cell
        empty = torch.zeros(len(self.masked), rows * columns, dtype=torch.bool, device=self.masked.device)
        return empty.scatter(1, self.masked, True).unflatten(1, (rows, columns))


def _enlarged(mask: Tensor, times: int) -> Tensor:
    return mask.repeat_interleave(times, dim=1).repeat_interleave(times, dim=2)
