"""Layers on the places of a map, [b, C, N]: what the mechanisms that read a set are made of.

A 1x1 convolution of any number of dimensions is one of the flattened places, so the same weights serve sequences,
images, videos, and the tokens of a masked image.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

Norm = Literal["batch", "layer"]


def pointwise(in_dim: int, out_dim: int, *, bias: bool = True) -> nn.Conv1d:
    """A linear layer of every place: [b, in_dim, N] -> [b, out_dim, N]."""
    return nn.Conv1d(in_dim, out_dim, 1, bias=bias)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of every place, [b, C, N]."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


def place_norm(kind: Norm, dim: int, momentum: float = 0.1) -> nn.Module:
    """The norm of a mechanism on [b, dim, N].

    "batch" is the one of the papers; its statistics are over a micro-batch of one rank. "layer" depends on the sample
    only. `momentum` is that of the batch statistics.

    Raises:
        ValueError: there is no such norm.
    """
    if kind == "batch":
        return nn.BatchNorm1d(dim, momentum=momentum)
    if kind == "layer":
        return ChannelNorm(dim)
    raise ValueError(f"norm {kind!r}: expected batch or layer")
