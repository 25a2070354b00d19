"""Two mixers that no one needs, as other mechanisms would be added: a file, and a line of the table each."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.layers.mixer import EVERY_TOKEN, Bias, Layout, Mixer
from pretrain.models.mechanisms import Mechanism

TOYS = {
    "toy_set": Mechanism("channel", "mixer", "set", f"{__name__}:SetMixer"),
    "toy_grid": Mechanism("spatial", "mixer", "grid", f"{__name__}:GridMixer"),
}


class SetMixer(Mixer):
    """Every token gets the mean of all."""

    def __init__(self, dim: int, num_heads: int, **of_attention: object):
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
        if bias is not None or rotation is not None:
            raise ValueError("toy_set reads no relative positions")
        return self.proj(x[:, queries] + x.mean(1, keepdim=True))


class GridMixer(Mixer):
    """Every patch gets the mean of its neighbours; prefix tokens pass."""

    def __init__(self, dim: int, num_heads: int, **of_attention: object):
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
        if layout is None or layout.keep is not None:
            raise ValueError("toy_grid reads the grid of all patches")
        prefix = layout.num_prefix_tokens
        neighbours = F.avg_pool2d(x[:, prefix:].transpose(1, 2).unflatten(2, layout.grid), 3, 1, 1)
        x = x.clone()
        x[:, prefix:] = neighbours.flatten(2).transpose(1, 2)
        return self.proj(x[:, queries])
