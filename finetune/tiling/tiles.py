"""Where the tiles of a large image lie. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from finetune.data.examples import Example
from pretrain.core.images import window_starts


@dataclass(frozen=True)
class Tile:
    """A part of an image, in its pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def box(self) -> np.ndarray:
        """x1, y1, x2, y2."""
        return np.array([self.left, self.top, self.left + self.width, self.top + self.height], np.float32)


@dataclass(frozen=True)
class Tiling:
    """Squares of `size` pixels, of which neighbours share at least `overlap`; the last ones end with the image.

    Raises:
        ValueError: the overlap is not smaller than the size.
    """

    size: int
    overlap: int

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.size:
            raise ValueError(
                f"tiles of {self.size} pixels with an overlap of {self.overlap}: it must be within 0 and less"
            )

    def starts(self, length: int) -> list[int]:
        """Of the tiles along a side."""
        return window_starts(length, self.size, self.size - self.overlap)

    def tiles(self, height: int, width: int) -> list[Tile]:
        """Row by row; an image smaller than a tile is one."""
        sides = min(self.size, height), min(self.size, width)
        return [Tile(top, left, *sides) for top in self.starts(height) for left in self.starts(width)]

    def parts(self, example: Example) -> Iterator[Example]:
        """The tiles of an image."""
        for tile in self.tiles(*example.image.shape[:2]):
            part = example.image[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]
            yield Example(example.id, example.name, np.ascontiguousarray(part), None)
