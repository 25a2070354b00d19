"""Projector and predictor of contrastive learning: linear layers and batch norm (Chen et al. 2021, appendix B)."""

from __future__ import annotations

from itertools import pairwise

from torch import nn


def mlp_head(in_dim: int, hidden_dim: int, out_dim: int, *, num_layers: int, last_norm: bool = True) -> nn.Sequential:
    """[b, in_dim] -> [b, out_dim]: linear layers without bias, each hidden one followed by batch norm and ReLU.

    Args:
        last_norm: the last layer is followed by a batch norm without scale and shift.

    Raises:
        ValueError: no layer.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}")
    widths = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
    layers: list[nn.Module] = []
    for index, (width, following) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(width, following, bias=False))
        if index < num_layers - 1:
            layers += [nn.BatchNorm1d(following), nn.ReLU(inplace=True)]
        elif last_norm:
            layers.append(nn.BatchNorm1d(following, affine=False))
    return nn.Sequential(*layers)
