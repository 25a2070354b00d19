"""Deformable convolution (v1: Dai et al. 2017; v2: Zhu et al. 2019, "Deformable ConvNets v2")."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from pretrain.models.mechanisms.contract import ConvMechanism


class DeformConv(ConvMechanism):
    """A convolution that samples at places of its own choice: sum_k w_k m_k x(p + p_k + offset_k), bilinear.

    A second convolution of the same geometry predicts the offsets, and in v2 (`modulated`) the masks m = sigmoid(.);
    v1 has m = 1. It starts at 0: v1 as a plain convolution, v2 as half of one. The v1 paper trains it at 0.1 times the
    learning rate. Samples outside of the map are 0.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as of `nn.Conv2d`.
        offset_groups: groups of input channels with offsets and masks of their own.
        modulated: v2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 1,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        offset_groups: int = 1,
        modulated: bool = True,
    ):
        super().__init__()
        if in_channels % offset_groups:
            raise ValueError(f"offset_groups={offset_groups} must divide in_channels={in_channels}")
        # Its parameters and geometry are those of a plain convolution, which is never called.
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        rows, columns = self.conv.kernel_size
        self.num_offsets = 2 * offset_groups * rows * columns
        self.modulated = modulated
        predicted = self.num_offsets * 3 // 2 if modulated else self.num_offsets
        self.offset = nn.Conv2d(in_channels, predicted, kernel_size, stride, padding, dilation)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.sample(x, *self.predict(x))

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Offsets in places, [b, 2 G K, H', W']: (rows, columns) of each of K kernel places, offset group by offset
        group; and masks [b, G K, H', W'], None in v1."""
        predicted = self.offset(x)
        if not self.modulated:
            return predicted, None
        return predicted[:, : self.num_offsets], predicted[:, self.num_offsets :].sigmoid()

    def sample(self, x: Tensor, offsets: Tensor, masks: Tensor | None) -> Tensor:
        """The convolution at given offsets and masks, in fp32: [b, out, H', W']."""
        conv = self.conv
        with torch.autocast(x.device.type, enabled=False):
            return deform_conv2d(
                x.float(),
                offsets.float(),
                conv.weight,
                conv.bias,
                stride=(conv.stride[0], conv.stride[1]),
                padding=(int(conv.padding[0]), int(conv.padding[1])),
                dilation=(conv.dilation[0], conv.dilation[1]),
                mask=None if masks is None else masks.float(),
            )
