"""The global context block: one weighted mean of all places changes every place alike."""

from __future__ import annotations

from typing import Literal

from timm.layers.global_context import GlobalContext as TimmGlobalContext
from torch import nn

from pretrain.models.mechanisms.contract import MapMechanism


class GlobalContext(TimmGlobalContext, MapMechanism):
    """x + MLP(c) or x * s(MLP(c)), c = sum over places n of softmax_n(w x) x (Cao et al. 2019, eq. 5).

    MLP = W2 relu(LN(W1 c)). Reads a set. Its last layer starts at 0, so adding starts as an identity, scaling at one
    half.

    Args:
        dim: channels C. reduction: the bottleneck has max(1, C // reduction) channels.
        hidden_dim: channels of the bottleneck, in place of `reduction`.
        pooling: "mean": all places weigh the same.
        fusion: "add", "scale", or "both", first scaled, then added, with an MLP each.
    """

    def __init__(
        self,
        dim: int,
        reduction: int = 16,
        *,
        hidden_dim: int | None = None,
        pooling: Literal["attention", "mean"] = "attention",
        fusion: Literal["add", "scale", "both"] = "add",
    ):
        super().__init__(
            dim,
            use_attn=pooling == "attention",
            fuse_add=fusion != "scale",
            fuse_scale=fusion != "add",
            rd_channels=hidden_dim or max(1, dim // reduction),
        )
        self.starts_as_identity = fusion == "add"
        for mlp in (self.mlp_add, self.mlp_scale):
            if mlp is not None:  # timm's norm has another eps, and its last bias is not 0
                mlp.norm.eps = 1e-5  # type: ignore[assignment]
                nn.init.zeros_(mlp.fc2.weight)
                assert mlp.fc2.bias is not None
                nn.init.zeros_(mlp.fc2.bias)
