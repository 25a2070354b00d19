"""Self-attention over a window (Ramachandran et al. 2019, "Stand-Alone Self-Attention in Vision Models")."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from pretrain.models.mechanisms.contract import ConvMechanism

Border = Literal["masked", "zero"]


class StandAloneAttention(ConvMechanism):
    """Attention of each place over its k x k window, in place of a convolution (eq. 2 and 3).

    softmax over the window of q . (key + r), r the relative embedding: of the row offset in the first half of a head's
    channels, of the column offset in the second; all heads share it. Scores are not scaled by the width.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as of `nn.Conv2d`; the kernel
            is odd and square, the padding what keeps the size, groups and bias are those of the linear layers.
        num_heads: of which each has out_channels / num_heads channels, an even number.
        border: "masked" leaves places outside of the map out of the softmax; "zero" lets them take part as zeros, as a
            padded convolution does.
        per_channel: a softmax for each channel, q * (key + r) not summed over a head: the form of a much used port,
            whose weights it opens, not the paper's. It has one head.

    Raises:
        ValueError: another kernel or padding, or heads that do not divide the channels into even numbers.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 7,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 3,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        num_heads: int = 8,
        border: Border = "masked",
        per_channel: bool = False,
    ):
        super().__init__()
        self.kernel, self.stride, self.dilation = _pair(kernel_size), _pair(stride), _pair(dilation)
        if self.kernel[0] != self.kernel[1] or self.kernel[0] % 2 == 0:
            raise ValueError(f"kernel_size {kernel_size}: a window around a place has an odd side, the same for both")
        self.margin = tuple(d * (k // 2) for d, k in zip(self.dilation, self.kernel, strict=True))
        if _pair(padding) != self.margin:
            raise ValueError(f"padding {padding}: windows around the places need {self.margin}")
        if border not in ("masked", "zero"):
            raise ValueError(f"border {border!r}: expected masked or zero")
        num_heads = 1 if per_channel else num_heads
        if out_channels % (2 * num_heads):
            raise ValueError(f"out_channels {out_channels} must be divisible by twice the {num_heads} heads")
        self.num_heads, self.border, self.per_channel = num_heads, border, per_channel
        layers = (nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=bias) for _ in range(3))
        self.query, self.key, self.value = layers
        half = out_channels // num_heads // 2
        self.rel_rows, self.rel_columns = (nn.Parameter(torch.randn(half, self.kernel[0])) for _ in range(2))
        for layer in (self.query, self.key, self.value):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x[:, :, :: self.stride[0], :: self.stride[1]])
        size = q.shape[2:]
        q = q.flatten(2).unflatten(1, (self.num_heads, -1))[:, :, :, None]  # [b, h, d, 1, n]
        k, v = self._windows(self.key, x), self._windows(self.value, x)
        scores = q * (k + self._relative()[:, :, None])
        scores = scores if self.per_channel else scores.sum(2, keepdim=True)
        if self.border == "masked":
            scores = scores.masked_fill(self._outside(x), float("-inf"))
        out = (scores.softmax(dim=3).to(v.dtype) * v).sum(3)
        return out.flatten(1, 2).unflatten(2, size)

    def _windows(self, layer: nn.Module, x: Tensor) -> Tensor:
        """`layer` of the places in each window, [b, h, d, k * k, n]."""
        padded = layer(self._pad(x))  # a bias reaches the padding too
        return self._unfold(padded).unflatten(1, (self.num_heads, -1, self.kernel[0] ** 2))

    def _relative(self) -> Tensor:
        """r of each place of a window, row by row: [d, k * k]."""
        k = self.kernel[0]
        of_rows = self.rel_rows[:, :, None].expand(-1, k, k)
        of_columns = self.rel_columns[:, None, :].expand(-1, k, k)
        return torch.cat([of_rows, of_columns]).flatten(1)

    def _outside(self, x: Tensor) -> Tensor:
        """Which places of each window are outside of the map: bool [1, 1, 1, k * k, n]."""
        inside = self._pad(torch.ones_like(x[:1, :1], dtype=torch.float32))
        return self._unfold(inside)[:, None, None] == 0

    def _pad(self, x: Tensor) -> Tensor:
        rows, columns = self.margin
        return F.pad(x, (columns, columns, rows, rows))

    def _unfold(self, padded: Tensor) -> Tensor:
        return F.unfold(padded, self.kernel, dilation=self.dilation, stride=self.stride)
