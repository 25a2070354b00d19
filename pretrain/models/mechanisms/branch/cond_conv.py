"""Conditionally parameterized convolution: every image mixes its kernel from those of experts."""

from __future__ import annotations

from typing import Any, Literal

from timm.layers.cond_conv2d import CondConv2d
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from pretrain.models.mechanisms.branch.kernels import mixed_conv2d
from pretrain.models.mechanisms.contract import ConvMechanism


class CondConv(ConvMechanism):
    """conv(x; sum_e r_e W_e), r = s(R mean(x)) (Yang et al. 2019, eq. 1 and 2). Replaces a convolution.

    A sigmoid, not a softmax: the r_e do not sum to 1. At the start r is about 1/2, so a kernel is about half the sum of
    the experts.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as of `nn.Conv2d`; padding
            "same": TensorFlow's, which the authors use, ceil(side / stride) places for every side.
        num_experts: E.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | Literal["same"] = 1,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        num_experts: int = 4,
    ):
        super().__init__()
        self.routing = nn.Linear(in_channels, num_experts)
        self.conv = CondConv2d(
            in_channels, out_channels, kernel_size, stride, 0, dilation, groups, bias, num_experts=num_experts
        )
        self.padding = None if padding == "same" else _pair(padding)

    def forward(self, x: Tensor) -> Tensor:
        conv: Any = self.conv
        shares = self.routing(x.mean((2, 3))).sigmoid()
        if self.padding is None:
            x = pad_same(x, conv.kernel_size, conv.stride, conv.dilation)
        return mixed_conv2d(
            x,
            conv.weight.unflatten(1, conv.weight_shape),
            conv.bias,
            shares,
            stride=conv.stride,
            padding=self.padding or (0, 0),
            dilation=conv.dilation,
            groups=conv.groups,
        )
