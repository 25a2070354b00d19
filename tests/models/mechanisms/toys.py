"""Mechanisms that no one needs, as other ones would be added: a file, and a line of the table each."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from pretrain.models.layers.mixer import EVERY_TOKEN, Bias, Layout, Mixer
from pretrain.models.mechanisms import Mechanism
from pretrain.models.mechanisms.contract import MapMechanism

TOYS = {
    "toy_mixer": Mechanism("channel", ("mixer",), "set", f"{__name__}:SetMixer"),
    "toy_set": Mechanism(
        "channel", ("gate", "mixer"), "set", f"{__name__}:SetMap", {"reduction": (PositiveInt, 2), "bias": (bool, True)}
    ),
    "toy_grid": Mechanism("spatial", ("stage", "mixer"), "grid", f"{__name__}:GridMap"),
}


class SetMixer(Mixer):
    """Every token gets the mean of all."""

    def __init__(self, dim: int, num_heads: int, **of_attention: Any):
        super().__init__()
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        queries: slice = EVERY_TOKEN,
        bias: Bias | None = None,
        rotation: Tensor | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        return self.proj(x[:, queries] + x.mean(1, keepdim=True))


class SetMap(MapMechanism):
    """Every channel is weighted by what the mean of the map says."""

    def __init__(self, dim: int, reduction: int, bias: bool):
        super().__init__()
        if dim % reduction:
            raise ValueError(f"reduction {reduction} does not divide {dim} channels")
        self.fc = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3))).sigmoid()[..., None, None]


class GridMap(MapMechanism):
    """Every patch gets the mean of its neighbours, after a convolution."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(x), 3, 1, 1)

    def check_grid(self, grid: tuple[int, int]) -> None:
        if min(grid) < 2:
            raise ValueError(f"a grid of {grid[0]} x {grid[1]} has no neighbours")
