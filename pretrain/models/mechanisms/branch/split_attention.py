"""Split attention: a grouped convolution into several splits, and a choice between them per channel."""

from __future__ import annotations

from typing import Literal

from timm.layers.split_attn import SplitAttn
from torch import nn

from pretrain.models.mechanisms.contract import ConvMechanism


class SplitAttention(SplitAttn, ConvMechanism):
    """sum_r a_r * u_r, u = relu(BN(conv x)) in R splits, a = softmax_r(W2 relu(BN(W1 mean(sum_r u_r)))).

    Zhang et al. 2020, sec. 3.1. Replaces a convolution, its norm and its ReLU. A single split is gated by a sigmoid. At
    the start all splits weigh about the same. Its batch norm reads one value per sample: it needs at least 2 samples in
    training.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as of `nn.Conv2d`; the groups
            are the paper's cardinality.
        radix: R.
        reduction: hidden channels of the choice are max(32, in_channels * radix // reduction).
        hidden_dim: these channels, in place of `reduction`.
        norm: "none": without the two batch norms.

    Raises:
        ValueError: `groups` does not divide the hidden channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | tuple[int, int] = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        radix: int = 2,
        reduction: int = 4,
        hidden_dim: int | None = None,
        norm: Literal["batch", "none"] = "batch",
    ):
        hidden = hidden_dim or max(32, in_channels * radix // reduction)
        if hidden % groups:
            raise ValueError(f"groups {groups} must divide the {hidden} hidden channels of split attention")
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,  # type: ignore[arg-type]
            dilation,
            groups,
            bias,
            radix,
            rd_ratio=hidden / (in_channels * radix),  # timm rounds in_channels * radix * rd_ratio
            rd_divisor=1,
            norm_layer=nn.BatchNorm2d if norm == "batch" else None,
        )
