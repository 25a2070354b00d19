"""The gated feed-forward network SwiGLU (Shazeer 2020), as DINOv2 sizes it, with timm's parameter names."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

FFN = Literal["mlp", "swiglu", "identity"]


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


def swiglu_hidden(hidden: int, *, multiple: int = 8) -> int:
    """Width of a SwiGLU with as many weights as an MLP of width `hidden`: two thirds, rounded up (DINOv2)."""
    return -(-(hidden * 2 // 3) // multiple) * multiple
