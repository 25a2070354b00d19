"""Selective kernel convolution: every channel chooses between kernels of several sizes."""

from __future__ import annotations

from collections.abc import Sequence

from timm.layers.selective_kernel import SelectiveKernel as TimmSelectiveKernel
from torch.nn.modules.utils import _pair

from pretrain.models.mechanisms.contract import ConvMechanism


class SelectiveKernel(TimmSelectiveKernel, ConvMechanism):
    """sum_i a_i * u_i, u_i = relu(BN(conv_i x)), a = softmax_i(W2 relu(BN(W1 mean(sum_i u_i)))) per channel.

    Li et al. 2019, eq. 1 to 6. Replaces a 3x3 convolution, its norm and its ReLU. At the start all branches weigh about
    the same. Its batch norm reads one value per sample: it needs at least 2 samples in training.

    Args:
        in_channels, out_channels, stride, dilation, groups: as of `nn.Conv2d`.
        kernel_size, padding, bias: of the convolution that it replaces: 3, `dilation` and false.
        branches: sizes of the kernels, odd, at least 3.
        dilated: a kernel larger than 3 is a dilated 3x3.
        split_input: each branch reads its own share of the input channels (timm's variant, not the paper's).
        reduction: hidden channels of the choice are max(32, out_channels // reduction), the paper's r and L.
        hidden_dim: these channels, in place of `reduction`.
        activation: of the branches.

    Raises:
        ValueError: it replaces another convolution than a 3x3 that keeps the size, or a branch is even or below 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int = 1,
        padding: int | tuple[int, int] | None = None,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        branches: Sequence[int] = (3, 5),
        dilated: bool = True,
        split_input: bool = False,
        reduction: int = 16,
        hidden_dim: int | None = None,
        activation: str = "relu",
    ):
        if _pair(kernel_size) != (3, 3) or _pair(padding if padding is not None else dilation) != _pair(dilation):
            raise ValueError(
                f"a selective kernel replaces a 3x3 convolution with padding equal to its dilation {dilation}, "
                f"not one of kernel {kernel_size} and padding {padding}"
            )
        if bias:
            raise ValueError("the branches of a selective kernel have a batch norm and no bias: set bias to false")
        if any(size < 3 or size % 2 == 0 for size in branches):
            raise ValueError(f"branches must be odd and at least 3, got {list(branches)}")
        super().__init__(
            in_channels,
            out_channels,
            kernel_size=list(branches),
            stride=stride,
            dilation=dilation,
            groups=groups,
            rd_channels=hidden_dim or max(32, out_channels // reduction),
            keep_3x3=dilated,
            split_input=split_input,
            act_layer=activation,  # type: ignore[arg-type]
        )
