"""Squeeze-and-excitation: the means of all channels decide how much of each channel passes."""

from __future__ import annotations

from typing import Literal

from timm.layers.squeeze_excite import SEModule

from pretrain.models.mechanisms.contract import MapMechanism


class SqueezeExcitation(SEModule, MapMechanism):
    """x * s(W2 relu(W1 mean(x))), the mean over all places (Hu et al. 2018, eq. 2 to 4).

    Reads a set. At the start about half of each channel passes: the logits are near 0.

    Args:
        dim: channels C. reduction: the bottleneck has max(1, C // reduction) channels.
        hidden_dim: channels of the bottleneck, in place of `reduction`.
        bias: of both layers. The authors' networks have them, most copies do not.
        activation: in the bottleneck (MobileNetV3: "relu", EfficientNet: "silu").
        gate: s (MobileNetV3: "hard_sigmoid").
    """

    def __init__(
        self,
        dim: int,
        reduction: int = 16,
        *,
        hidden_dim: int | None = None,
        bias: bool = True,
        activation: str = "relu",
        gate: Literal["sigmoid", "hard_sigmoid"] = "sigmoid",
    ):
        width = hidden_dim or max(1, dim // reduction)
        super().__init__(dim, rd_channels=width, bias=bias, act_layer=activation, gate_layer=gate)  # type: ignore[arg-type]
