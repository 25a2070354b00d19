"""Parts that the heads for dense prediction share: a normalized convolution, resizing, channel dropout."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.layers.sync_batch_norm import SyncBatchNorm


class MapReader(nn.Module):
    """Base of the heads that read feature maps: maps [b, C_i, h_i, w_i], finest first -> [b, out_channels, h, w].

    Attributes:
        noise: uniform random numbers per image that `forward` reads in training; 0: none.
        fixed_size_reason: why its graph accepts one image size only; None: it accepts any.
    """

    noise = 0
    fixed_size_reason: str | None = None

    def forward(self, maps: Sequence[Tensor], uniforms: Tensor | None = None) -> Tensor:
        """`uniforms`: [b, noise] in training, for dropout of channels."""
        raise NotImplementedError


class ConvNormReLU(nn.Sequential):
    """A convolution without bias that keeps the size, batch norm over all ranks, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1):
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        super().__init__(conv, SyncBatchNorm(out_channels), nn.ReLU(inplace=True))


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps [b, C, h, w] at another `size`, bilinear between pixel centres; unchanged if they have that size."""
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=(size[0], size[1]), mode="bilinear", align_corners=False)


def without_padding(maps: Tensor, size: Sequence[int], stride: int) -> Tensor:
    """Maps [b, C, h, w] of images of `size` = (height, width) that were padded at the right and below to multiples
    of `stride` pixels, without the padding: unchanged if there was none, else at the size of the images."""
    whole = tuple(-(-side // stride) * stride for side in size)
    return maps if whole == tuple(size) else resize(maps, whole)[:, :, : size[0], : size[1]]


def drop_channels(maps: Tensor, uniforms: Tensor | None, rate: float) -> Tensor:
    """Spatial dropout (Tompson et al. 2015): channels of [b, C, h, w] become 0, the others grow by 1 / (1 - rate).

    Args:
        uniforms: uniform random numbers [b, C]; channels whose number is below `rate` become 0. None: evaluation.
    """
    if uniforms is None or not rate:
        return maps
    kept = (uniforms >= rate).to(maps.dtype) / (1 - rate)
    return maps * kept[:, :, None, None]


def linear_classes(in_channels: int, num_classes: int) -> nn.Conv2d:
    """The last layer, 1 x 1, starting at normal(0, 0.01) as in the field's segmentation code."""
    layer = nn.Conv2d(in_channels, num_classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
