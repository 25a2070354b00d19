"""Rotary positions of a grid of patches (Su et al. 2021), axial and normalized as DINOv3 uses them (section 3.2).

Rows and columns are mapped to [-1, 1] each, so that another grid is another sampling of the same square and nothing
has to be resampled. In training the coordinates can be moved and stretched at random.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pretrain.models.layers import free_rope

BASE = 100.0
NUM_DRAWN = 5  # uniform random numbers of `moved_axes`: two shifts, two factors of the axes, one of both


@dataclass(frozen=True)
class Rope:
    """How positions become angles: 2 pi coordinate / period, a quarter of a head's channels per axis.

    Attributes:
        base: periods are base^(i / n) for i < n, n = head dimension / 4.
        periods: the first and the last of n geometric ones, instead of `base`.
        normalize: coordinates are (i + 0.5) / n * 2 - 1; n is the axis's own length, or the longer or shorter of both.
        precision: of coordinates, periods and angles; DINOv3 was trained with bf16.
        frequencies: the lowest and the highest of frequencies that are weights of each block, in place of all of these
            (see `free_rope`); then a table holds coordinates.
    """

    base: float = BASE
    periods: tuple[float, float] | None = None
    normalize: Literal["separate", "max", "min"] = "separate"
    precision: Literal["fp32", "bf16"] = "fp32"
    frequencies: tuple[float, float] | None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    def periods_of(self, head_dim: int, *, device: torch.device | None = None) -> Tensor:
        """The periods [head_dim / 4], in `dtype`.

        Raises:
            ValueError: `head_dim` is not a multiple of 4.
        """
        if head_dim % 4:
            raise ValueError(f"head dimension {head_dim} is not a multiple of 4, which rotary positions need")
        count = head_dim // 4
        if self.periods is None:
            return self.base ** (torch.arange(count, device=device, dtype=self.dtype) / count)
        first, last = self.periods
        shares = torch.linspace(0, 1, count, device=device, dtype=self.dtype)
        return (last / first) ** shares / (last / first) * last  # in the order of DINOv3, which bf16 shows

    def table(
        self,
        grid_size: tuple[int, int],
        head_dim: int,
        *,
        num_prefix: int = 0,
        extra: int = 0,
        axes: Tensor | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Sines and cosines, fp32 [2, 1, 1, extra + P + N, head_dim]; the `extra` and `num_prefix` tokens have no
        position and stay unrotated. With `frequencies` coordinates [1, 1, 1, extra + P + N, 2].

        Args:
            axes: [2, 2], offset and factor of the coordinates of rows, then of columns; see `moved_axes`.

        Raises:
            ValueError: `head_dim` is not a multiple of 4, or coordinates with `frequencies` are to be moved.
        """
        if self.frequencies is not None:
            if axes is not None:
                raise ValueError("coordinates of rope.frequencies are not moved in training")
            return free_rope.coordinates(grid_size, num_prefix, extra=extra, device=device)
        periods = self.periods_of(head_dim, device=device)
        lengths = {"separate": grid_size, "max": (max(grid_size),) * 2, "min": (min(grid_size),) * 2}[self.normalize]
        lines = [
            (torch.arange(count, device=device, dtype=torch.float32) + 0.5).to(self.dtype) / length * 2 - 1
            for count, length in zip(grid_size, lengths, strict=True)
        ]
        if axes is not None:
            moves = axes.to(self.dtype)
            lines = [(line + move[0]) * move[1] for line, move in zip(lines, moves, strict=True)]
        places = torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1).flatten(0, 1)
        angles = (2 * math.pi * places[:, :, None] / periods).flatten(1).tile(2)
        angles = torch.cat([angles.new_zeros(extra + num_prefix, head_dim), angles])
        return torch.stack([angles.sin(), angles.cos()]).float()[:, None, None]


def moved_axes(uniform: Tensor, *, shift: float | None, jitter: float | None, rescale: float | None) -> Tensor:
    """Offsets and factors [..., 2 axes, 2] from uniform random numbers [..., NUM_DRAWN].

    The coordinate of an axis becomes (c + offset) * factor, in this order as in DINOv3 (section 3.2).

    Args:
        shift: the offsets are uniform within +- shift, one per axis.
        jitter: the factors are log-uniform within [1 / jitter, jitter], one per axis.
        rescale: in addition a log-uniform factor of both axes. None: leaves this out.
    """
    signed = 2 * uniform - 1
    offsets = signed[..., :2] * (shift or 0.0)
    logs = signed[..., 2:4] * math.log(jitter or 1.0) + signed[..., 4:] * math.log(rescale or 1.0)
    return torch.stack([offsets, logs.exp()], dim=-1)


def keep_tokens(table: Tensor, tokens: Tensor) -> Tensor:
    """The rows of `tokens` int64 [b, s] of a table [2, 1, 1, P + N, d] -> [2, b, 1, s, d]."""
    return table[:, 0, 0][:, tokens][:, :, None]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Queries or keys [b, h, s, d] rotated by their positions; computed in fp32, returned in the type of x."""
    sin, cos = table
    low, high = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-high, low], dim=-1) * sin).to(x.dtype)
