"""How linear layers start."""

from __future__ import annotations

from typing import Literal

from torch import nn


def initialize_linears(module: nn.Module, how: Literal["xavier", "trunc_normal"], *, bound: float = 2.0) -> None:
    """Start every Linear below `module` xavier-uniform (MAE) or from a normal of 0.02 cut at `bound` (DINO), bias 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            if how == "xavier":
                nn.init.xavier_uniform_(layer.weight)
            else:
                nn.init.trunc_normal_(layer.weight, std=0.02, a=-bound, b=bound)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
