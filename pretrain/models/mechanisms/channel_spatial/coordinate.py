"""Coordinate attention: a gate per row and a gate per column, for each channel."""

from __future__ import annotations

from timm.layers.coord_attn import CoordAttn

from pretrain.models.mechanisms.contract import MapMechanism


class CoordinateAttention(CoordAttn, MapMechanism):
    """x * s(W_h f_h) * s(W_w f_w), f = hswish(BN(W1 [mean over columns, mean over rows])).

    Hou et al. 2021, eq. 4 to 8. Reads the grid. At the start about a quarter of the map passes.

    Args:
        dim: channels C. reduction: f has max(8, C // reduction) channels.
    """

    def __init__(self, dim: int, reduction: int = 32):
        super().__init__(dim, rd_channels=max(8, dim // reduction), bias=True)
