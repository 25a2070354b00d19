"""A plain implementation of BEiT's blocks, for the plain steps of BEiT, SimMIM, data2vec and VQ-KD."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainAttention(nn.Module):
    """Attention with a bias on queries and values only."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        b, t, dim = x.shape
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, qkv_bias).reshape(b, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * (dim // self.num_heads) ** -0.5, qkv[1], qkv[2]
        scores = (q @ k.transpose(-2, -1) + bias).softmax(-1)
        return self.proj((scores @ v).transpose(1, 2).reshape(b, t, dim))


class PlainBlock(nn.Module):
    """Pre-norm block; with `layer_scale` a factor on both branches. The bias is added to the scores of every head."""

    def __init__(self, dim: int, num_heads: int, *, mlp_ratio: float, layer_scale: float | None = None):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = PlainAttention(dim, num_heads)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})
        self.ls1, self.ls2 = nn.ParameterDict(), nn.ParameterDict()
        if layer_scale is not None:
            for scale in (self.ls1, self.ls2):
                scale["gamma"] = torch.full((dim,), layer_scale)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + scaled(self.ls1, self.attn(self.norm1(x), bias))
        return x + scaled(self.ls2, self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))


def scaled(scale: nn.ParameterDict, branch: Tensor) -> Tensor:
    return scale["gamma"] * branch if "gamma" in scale else branch


def plain_index(side: int) -> Tensor:
    """The row of the table for every pair of tokens, [1 + side^2, 1 + side^2]."""
    place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
    offset = (place[:, :, None] - place[:, None, :]).permute(1, 2, 0) + side - 1
    rows = (2 * side - 1) ** 2
    index = torch.full((1 + side * side,) * 2, rows + 2)
    index[1:, 1:] = offset[..., 0] * (2 * side - 1) + offset[..., 1]
    index[0, 1:], index[1:, 0] = rows, rows + 1
    return index
