"""Feed-forward networks with timm's parameter names: gated (SwiGLU, Shazeer 2020, as DINOv2 sizes it) and sparse."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import Mlp  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

FFN = Literal["mlp", "swiglu", "relu2", "topk", "identity"]
SWIGLU_MULTIPLE = 8  # of which the width of a SwiGLU is
TOPK = 0.1  # usual share of the units that "topk" keeps


class SquaredReLU(nn.Module):
    """max(0, x)^2 (So et al. 2021, Primer, section 4.1)."""

    def forward(self, x: Tensor) -> Tensor:
        """[...] -> the same shape."""
        return F.relu(x).square()


class TopK(nn.Module):
    """GELU of the units of each token where it is among the largest, else 0: the Top-K transformer of Li et al. 2022
    (The Lazy Neuron Phenomenon, section 4), with the GELU of a vision transformer.

    Args:
        share: of the units, above 0 to 1; at least one unit is kept. 1: GELU.
    """

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """[..., units] -> the same shape."""
        x, units = F.gelu(x), x.shape[-1]
        kept = x.topk(max(1, round(self.share * units)), dim=-1, sorted=False)
        return torch.zeros_like(x).scatter(-1, kept.indices, kept.values)

    def extra_repr(self) -> str:
        return f"share={self.share:g}"


def build_ffn(
    kind: FFN, dim: int, hidden: int, *, bias: bool = True, topk: float = TOPK, multiple: int = SWIGLU_MULTIPLE
) -> nn.Module:
    """The feed-forward network of a block: tokens [..., D] -> [..., D].

    Args:
        hidden: units of the MLP; of a SwiGLU with as many weights. topk: share of the units that "topk" keeps.
        multiple: the width of a SwiGLU is rounded up to one of this number.
    """
    if kind == "identity":
        return nn.Identity()
    if kind == "swiglu":
        return SwiGLU(dim, swiglu_hidden(hidden, multiple=multiple), bias=bias)
    mlp = Mlp(dim, hidden, bias=bias)
    if kind == "relu2":
        mlp.act = SquaredReLU()
    elif kind == "topk":
        mlp.act = TopK(topk)
    return mlp


class SwiGLU(nn.Module):
    """fc2(silu(gate) * value), where fc1 gives the gate (first half) and the value together, as one product."""

    def __init__(self, dim: int, hidden: int, *, bias: bool = True):
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [..., D] -> [..., D]."""
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


def swiglu_hidden(hidden: int, *, multiple: int = SWIGLU_MULTIPLE) -> int:
    """Width of a SwiGLU with as many weights as an MLP of width `hidden`: two thirds, rounded up (DINOv2)."""
    return -(-(hidden * 2 // 3) // multiple) * multiple
