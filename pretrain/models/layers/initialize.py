"""How linear layers start."""

from __future__ import annotations

from typing import Literal

from torch import nn


def initialize_linears(module: nn.Module, how: Literal["xavier", "trunc_normal"], *, bound: float = 2.0) -> None:
    """Start every Linear below `module` xavier-uniform (MAE) or from a normal of 0.02 cut at `bound` (DINO), bias 0.

    A module with an attribute `own_start` keeps its start, and all below it.
    """
    if getattr(module, "own_start", False):
        return
    for layer in (module, *module.children()):
        if layer is not module:
            initialize_linears(layer, how, bound=bound)
        elif isinstance(layer, nn.Linear):
            if how == "xavier":
                nn.init.xavier_uniform_(layer.weight)
            else:
                nn.init.trunc_normal_(layer.weight, std=0.02, a=-bound, b=bound)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
