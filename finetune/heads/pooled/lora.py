"""Low-rank adaptation of frozen weights (Hu et al. 2021): W + alpha / rank * B A, where only A and B are trained."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.backbones.contract import Backbone

_PATHS = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}


class AdaptedLinear(nn.Module):
    """A linear layer [n] -> [m] whose weight is the frozen one of `linear` plus a low-rank update, initially zero.

    `weight` is the sum, for code that reads a layer's weight: our attention takes slices of it.
    """

    def __init__(self, linear: nn.Linear, *, rank: int, alpha: float):
        super().__init__()
        self.frozen, self.bias = linear.weight, linear.bias
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.empty(rank, linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    @property
    def weight(self) -> Tensor:
        return self.frozen + self.scale * (self.up @ self.down)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def add_lora(backbone: Backbone, *, rank: int, alpha: float, layers: Sequence[str]) -> None:
    """Freeze the backbone and train low-rank updates of `layers` of its blocks.

    Raises:
        ValueError: it has no such layers, or they cannot have this rank.
    """
    backbone.requires_grad_(False)
    if "layers" not in backbone.provides:
        raise ValueError("task.train: lora, but the backbone is not made of transformer blocks")
    for number, block in enumerate(backbone.trunk.blocks):
        for path in (_PATHS[layer] for layer in layers):
            linear = dict(block.named_modules()).get(path)
            if not isinstance(linear, nn.Linear):
                raise ValueError(f"task.lora.layers: block {number} of the backbone has no linear {path}")
            if any(True for _ in linear.children()):
                raise ValueError(f"task.lora.layers: a mechanism stands on {path} of block {number}; leave it out")
            if rank > min(linear.weight.shape):
                rows, columns = linear.weight.shape
                raise ValueError(f"task.lora.rank: {rank} is more than {path} of {rows} x {columns} can have")
            block.set_submodule(path, AdaptedLinear(linear, rank=rank, alpha=alpha))


@torch.no_grad()
def merged_state(backbone: nn.Module) -> dict[str, Tensor]:
    """The state of an equivalent backbone without adapted layers."""
    state = backbone.state_dict()
    for path, layer in backbone.named_modules():
        if isinstance(layer, AdaptedLinear):
            for name in ("frozen", "down", "up"):
                del state[f"{path}.{name}"]
            state[f"{path}.weight"] = layer.weight
    return state
