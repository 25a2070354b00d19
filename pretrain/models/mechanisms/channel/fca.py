"""Frequency channel attention: a channel is squeezed to one frequency of its map, not to its mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.mechanisms.contract import MapMechanism

SPACE = 7  # frequencies are counted in a space of 7 x 7
Ranking = Literal["top", "low", "bot"]
# (vertical, horizontal) frequencies as digits: by their accuracy alone on ImageNet, from the best ("top") and from the
# worst ("bot"), and from the lowest upwards ("low").
RANKED: dict[Ranking, str] = {
    "top": "00 01 60 05 02 10 12 40 50 16 30 04 06 03 35 22 46 63 33 53 55 21 61 52 54 32 31 41 23 20 65 13",
    "low": "00 01 10 11 02 20 21 12 22 03 30 40 04 13 31 05 14 23 32 41 50 06 15 24 33 42 51 60 16 25 34 43",
    "bot": "66 14 34 36 26 43 11 24 44 45 56 15 42 62 25 51 64 13 65 20 23 41 31 32 54 52 61 21 55 53 33 63",
}


class FCA(MapMechanism):
    """x * s(W2 relu(W1 f)), f_c = sum over places of x_c times a basis map of the 2-D cosine transform.

    Qin et al. 2021, eq. 10 to 12. The channels are divided into as many consecutive groups as there are frequencies,
    and a group shares one. The frequency (0, 0) is a multiple of the mean, so `frequencies` low1 is a scaled
    squeeze-and-excitation. Reads the grid; maps of another size than `grid` are pooled to it first. At the start about
    half of each channel passes.

    Args:
        dim: channels C. reduction: the bottleneck has max(1, C // reduction) channels.
        grid: rows and columns of the basis maps, at least 7 x 7: a side below 7 has only the frequency 0.
        ranking, num_frequencies: which frequencies, the first of the ranking (1 to 32, a divisor of C).

    Raises:
        ValueError: a smaller grid, or a number of frequencies that is not 1 to 32 or does not divide C.
    """

    basis: Tensor

    def __init__(
        self,
        dim: int,
        reduction: int = 16,
        *,
        grid: tuple[int, int] = (SPACE, SPACE),
        ranking: Ranking = "top",
        num_frequencies: int = 16,
    ):
        super().__init__()
        if min(grid) < SPACE:
            raise ValueError(
                f"FCA needs a grid of at least {SPACE} x {SPACE}, got {grid[0]} x {grid[1]}: "
                "a side below it has only the frequency 0"
            )
        if not 1 <= num_frequencies <= 32 or dim % num_frequencies:
            raise ValueError(f"num_frequencies must be 1 to 32 and divide dim {dim}, got {num_frequencies}")
        self.grid = (grid[0], grid[1])
        chosen = [(int(pair[0]), int(pair[1])) for pair in RANKED[ranking].split()[:num_frequencies]]
        maps = cosine_basis(chosen, self.grid).repeat_interleave(dim // num_frequencies, dim=0)
        self.register_buffer("basis", maps, persistent=False)
        width = max(1, dim // reduction)
        self.fc1 = nn.Linear(dim, width, bias=False)
        self.fc2 = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = (self._pooled(x) * self.basis).sum((2, 3))
        gate = self.fc2(F.relu(self.fc1(squeezed))).sigmoid()
        return x * gate[:, :, None, None]

    def _pooled(self, x: Tensor) -> Tensor:
        """Maps of the size of `grid`. ONNX has no adaptive pooling of a size that is not known: there a product."""
        if not torch.compiler.is_exporting():
            return x if tuple(x.shape[2:]) == self.grid else F.adaptive_avg_pool2d(x, self.grid)
        rows, columns = (_shares(x.shape[axis], self.grid[axis - 2], x) for axis in (2, 3))
        return rows @ x @ columns.transpose(0, 1)


def _shares(length: int, bins: int, like: Tensor) -> Tensor:
    """What each place of a side gives to each of its bins in adaptive average pooling, [bins, length]."""
    place, bin = torch.arange(length, device=like.device), torch.arange(bins, device=like.device)[:, None]
    first, end = bin * length // bins, -(-(bin + 1) * length // bins)
    inside = ((place >= first) & (place < end)).to(like.dtype)
    return inside / (end - first).to(like.dtype)


def cosine_basis(frequencies: Sequence[tuple[int, int]], grid: tuple[int, int]) -> Tensor:
    """Orthonormal basis maps of the type-II cosine transform, [n, H, W], one per pair of frequencies of a 7 x 7 space.

    A side of n * 7 places has its frequencies multiplied by n.
    """
    rows, columns = (_waves([pair[axis] for pair in frequencies], grid[axis]) for axis in (0, 1))
    return (rows[:, :, None] * columns[:, None, :]).float()


def _waves(frequencies: Sequence[int], side: int) -> Tensor:
    """[n, side] in fp64."""
    frequency = torch.tensor(frequencies, dtype=torch.float64)[:, None] * (side // SPACE)
    place = torch.arange(side, dtype=torch.float64) + 0.5
    norm = torch.where(frequency == 0, 1.0, 2.0).sqrt() / math.sqrt(side)
    return torch.cos(math.pi / side * frequency * place) * norm
