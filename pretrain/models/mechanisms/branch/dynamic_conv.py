"""Dynamic convolution: every image mixes its kernel from K, by a softmax whose temperature falls."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from pretrain.models.mechanisms.branch.kernels import mixed_conv2d
from pretrain.models.mechanisms.contract import ConvMechanism


class DynamicConv(ConvMechanism):
    """conv(x; sum_k p_k W_k, sum_k p_k b_k), p = softmax(W2 relu(W1 mean(x)) / t) (Chen et al. 2020, eq. 2, sec. 3).

    Replaces a convolution. At the start t is high, so all kernels learn; the paper lowers it linearly to 1 in the first
    10 epochs.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as of `nn.Conv2d`.
        num_kernels: K. ratio: hidden channels are int(ratio * in_channels) + 1, for images (3 channels) K.
        temperature: t at the start, at least 1.
        temperature_steps: optimizer steps in which t falls linearly to 1; 0: it stays.

    Raises:
        ValueError: a temperature below 1.
    """

    temperature: Tensor

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
        num_kernels: int = 4,
        ratio: float = 0.25,
        temperature: float = 30.0,
        temperature_steps: int = 0,
    ):
        super().__init__()
        if temperature < 1:
            raise ValueError(f"temperature must be at least 1, got {temperature}")
        self.stride, self.padding, self.dilation = _pair(stride), _pair(padding), _pair(dilation)
        self.groups = groups
        hidden = num_kernels if in_channels == 3 else int(in_channels * ratio) + 1
        self.fc1 = nn.Linear(in_channels, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, num_kernels)
        shape = (num_kernels, out_channels, in_channels // groups, *_pair(kernel_size))
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.zeros(num_kernels, out_channels)) if bias else None
        for kernel in self.weight:
            nn.init.kaiming_normal_(kernel)
        for layer in (self.fc1, self.fc2):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc2.bias)
        self.register_buffer("temperature", torch.tensor(float(temperature)))
        self._fall = (temperature - 1) / temperature_steps if temperature_steps else 0.0

    def forward(self, x: Tensor) -> Tensor:
        logits = self.fc2(F.relu(self.fc1(x.mean((2, 3)))))
        return mixed_conv2d(
            x,
            self.weight,
            self.bias,
            (logits / self.temperature).softmax(dim=1),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    @torch.no_grad()
    def after_step(self) -> None:
        self.temperature.copy_((self.temperature - self._fall).clamp(min=1.0))
