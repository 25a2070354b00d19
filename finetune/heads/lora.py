"""Low-rank adaptation of frozen weights (Hu et al. 2021): W + alpha / rank * B A, where only A and B learn.

It is a parametrization of the weight itself, so that whatever reads the weight reads the sum: our attention, which
takes slices of it, and any of timm's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_PATHS = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}


class LowRank(nn.Module):
    """weight [m, n] -> weight + scale * up @ down; it starts as the weight."""

    def __init__(self, rows: int, columns: int, *, rank: int, alpha: float):
        super().__init__()
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.empty(rank, columns))
        self.up = nn.Parameter(torch.zeros(rows, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.up @ self.down)


def add_lora(backbone: Any, *, rank: int, alpha: float, layers: Sequence[str]) -> None:
    """Freeze the backbone and let low-rank updates of `layers` of its blocks learn.

    Raises:
        ValueError: it has no such layers.
    """
    backbone.requires_grad_(False)
    if "layers" not in backbone.provides:
        raise ValueError("task.train: lora, but the backbone is not made of transformer blocks")
    for number, block in enumerate(backbone.get_submodule(f"{backbone.blocks_prefix}blocks")):
        found = dict(block.named_modules())
        for layer in layers:
            linear = found.get(_PATHS[layer])
            if not isinstance(linear, nn.Linear):
                raise ValueError(f"task.lora.layers: block {number} of the backbone has no linear {_PATHS[layer]}")
            rows, columns = linear.weight.shape
            if rank > min(rows, columns):
                raise ValueError(f"task.lora.rank: {rank} is more than {_PATHS[layer]} of {rows} x {columns} can have")
            parametrize.register_parametrization(linear, "weight", LowRank(rows, columns, rank=rank, alpha=alpha))


def merge_lora(module: nn.Module) -> None:
    """Write the sums into the weights and take the updates away, in place."""
    for part in list(module.modules()):
        if parametrize.is_parametrized(part, "weight"):
            parametrize.remove_parametrizations(part, "weight", leave_parametrized=True)
