"""Large-kernel attention: a map is multiplied by its own depthwise convolution of 23 x 23 places."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.mechanisms.contract import MapMechanism


class LKA(MapMechanism):
    """x + W2(u * k(u)), u = gelu(W1 x), k(u) = a 1x1 of a dilated depthwise 7x7 of a depthwise 5x5.

    Guo et al. 2022, eq. 1 and 2, with the projections and the shortcut of their networks. Reads the grid.

    Args:
        dim: channels C.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.near = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.far = nn.Conv2d(dim, dim, 7, padding=9, groups=dim, dilation=3)
        self.mix = nn.Conv2d(dim, dim, 1)
        self.proj_out = nn.Conv2d(dim, dim, 1)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        u = F.gelu(self.proj_in(x))
        return x + self.proj_out(u * self.mix(self.far(self.near(u))))


class LKABlock(MapMechanism):
    """A block of the Visual Attention Network: x + g1 * LKA(BN(x)), then x + g2 * MLP(BN(x)).

    The MLP is 1x1, depthwise 3x3, gelu, 1x1. The factors g per channel start at `layer_scale`, so a new block is close
    to an identity. Reads the grid.

    Args:
        dim: channels C. mlp_ratio: hidden channels of the MLP, over C. layer_scale: start of g1 and g2.
    """

    def __init__(self, dim: int, *, mlp_ratio: float = 4.0, layer_scale: float = 1e-2):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.BatchNorm2d(dim)
        self.attn = LKA(dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.near = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.gamma1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.gamma2 = nn.Parameter(torch.full((dim,), layer_scale))
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma1[:, None, None] * self.attn(self.norm1(x))
        hidden = F.gelu(self.near(self.fc1(self.norm2(x))))
        return x + self.gamma2[:, None, None] * self.fc2(hidden)


def initialize(module: nn.Module) -> None:
    """Start every convolution from a normal of variance 2 / (outputs that one input value reaches), biases at 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            reached = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels // layer.groups
            nn.init.normal_(layer.weight, std=math.sqrt(2.0 / reached))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
