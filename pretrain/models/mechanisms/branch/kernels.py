"""A convolution whose kernel is another mixture of the same kernels for every image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mixed_conv2d(
    x: Tensor,
    kernels: Tensor,
    biases: Tensor | None,
    shares: Tensor,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """Maps [b, C, H, W] -> [b, D, H', W'], image i by the kernel sum_e shares[i, e] * kernels[e].

    In training and in inference the mixed kernels of all images are the groups of one convolution. Under
    `torch.export`, where the batch may not be in the groups, the outputs of all kernels are mixed: the same up to
    rounding, at the cost of E convolutions.

    Args:
        kernels: [E, D, C / groups, k, k]. biases: [E, D]. shares: [b, E].
    """
    b, (experts, out) = x.shape[0], kernels.shape[:2]
    if torch.compiler.is_exporting():
        grouped = kernels.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 2)
        y = F.conv2d(x, grouped, None, stride, padding, dilation, groups)
        y = y.unflatten(1, (groups, experts, -1)) * shares[:, None, :, None, None, None]
        y = y.sum(2).flatten(1, 2)
        return y if biases is None else y + (shares @ biases)[:, :, None, None]
    mixed = (shares @ kernels.flatten(1)).view(b * out, *kernels.shape[2:])
    bias = None if biases is None else (shares @ biases).flatten()
    y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), mixed, bias, stride, padding, dilation, groups * b)
    return y.view(b, out, *y.shape[2:])
