"""UPerNet (Xiao et al. 2018, "Unified Perceptual Parsing for Scene Understanding", section 3) on any backbone.

A plain ViT gives four maps of one stride; as in BEiT (Bao et al. 2021, appendix) and MAE's transfer to ADE20K, they are
taken from four blocks and rescaled by 4, 2, 1 and 1/2 to a pyramid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.heads.pixels.dense_parts import ConvNormReLU, MapReader, drop_channels, linear_classes, resize
from pretrain.models.layers.sync_batch_norm import SyncBatchNorm

POOL_SCALES = (1, 2, 3, 6)


class Rescaled(nn.Module):
    """Four maps of equal stride -> the same channels at 4, 2, 1 and 1/2 times the size."""

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        _need_four(channels)
        first, second = channels[0], channels[1]
        self.up4 = nn.Sequential(
            nn.ConvTranspose2d(first, first, 2, stride=2),
            SyncBatchNorm(first),
            nn.GELU(),
            nn.ConvTranspose2d(first, first, 2, stride=2),
        )
        self.up2 = nn.ConvTranspose2d(second, second, 2, stride=2)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        halved = F.max_pool2d(maps[3], 2, stride=2, ceil_mode=True)
        return [self.up4(maps[0]), self.up2(maps[1]), maps[2], halved]


class PyramidPooling(nn.Module):
    """Means over grids of each of `scales`, resized back and joined with the map (Zhao et al. 2017, PSPNet)."""

    def __init__(self, in_channels: int, channels: int, scales: Sequence[int] = POOL_SCALES):
        super().__init__()
        self.scales = tuple(scales)
        self.reduce = nn.ModuleList(ConvNormReLU(in_channels, channels) for _ in scales)
        self.join = ConvNormReLU(in_channels + len(self.scales) * channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = [
            resize(reduce(cell_means(x, scale)), x.shape[2:])
            for scale, reduce in zip(self.scales, self.reduce, strict=True)
        ]
        return self.join(torch.cat([x, *pooled], dim=1))


def cell_means(x: Tensor, cells: int) -> Tensor:
    """Means of [b, C, h, w] over `cells` x `cells` parts, [b, C, cells, cells], as adaptive average pooling.

    Computed as matrix products: torch's adaptive pooling has no deterministic gradient on a GPU.
    """
    rows, columns = (_means_of_parts(length, cells).to(x) for length in x.shape[2:])
    return rows @ x @ columns.T


def _means_of_parts(length: int, parts: int) -> Tensor:
    """[parts, length]: part i averages from floor(i * length / parts) to ceil((i + 1) * length / parts)."""
    weights = torch.zeros(parts, length)
    for i in range(parts):
        start, stop = i * length // parts, -(-(i + 1) * length // parts)
        weights[i, start:stop] = 1 / (stop - start)
    return weights


class UPerNet(MapReader):
    """Four maps -> logits [b, num_classes, h, w] on the grid of the finest of its pyramid.

    Args:
        channels, strides: of the four maps; equal strides are rescaled to a pyramid first.
        width: channels of the head (512 and, with ViT-B of MAE and BEiT, 768).
        dropout: rate of channel dropout before the classifier.

    Raises:
        ValueError: not four maps.
    """

    fixed_size_reason = "UPerNet's pooling pyramid is built for one grid"

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        *,
        width: int = 512,
        pool_scales: Sequence[int] = POOL_SCALES,
        dropout: float = 0.1,
    ):
        super().__init__()
        _need_four(channels)
        self.dropout = dropout
        self.noise = width if dropout else 0
        self.rescale = Rescaled(channels) if len(set(strides)) == 1 else None
        self.pool = PyramidPooling(channels[3], width, pool_scales)
        self.laterals = nn.ModuleList(ConvNormReLU(count, width) for count in channels[:3])
        self.smooth = nn.ModuleList(ConvNormReLU(width, width, 3) for _ in range(3))
        self.fuse = ConvNormReLU(4 * width, width, 3)
        self.classify = linear_classes(width, num_classes)

    def forward(self, maps: Sequence[Tensor], uniforms: Tensor | None = None) -> Tensor:
        """Maps [b, C_i, h_i, w_i], finest first -> logits at 4 times the ViT's grid; `uniforms` [b, noise]."""
        if self.rescale is not None:
            maps = self.rescale(maps)
        levels = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=False)]
        levels.append(self.pool(maps[3]))
        for finer in (2, 1, 0):
            levels[finer] = levels[finer] + resize(levels[finer + 1], levels[finer].shape[2:])
        for i, smooth in enumerate(self.smooth):
            levels[i] = smooth(levels[i])
        fused = self.fuse(torch.cat([resize(level, levels[0].shape[2:]) for level in levels], dim=1))
        return self.classify(drop_channels(fused, uniforms, self.dropout))


class AuxiliaryFCN(nn.Module):
    """A map of a middle block -> logits on its grid, for a second loss in training (Zhao et al. 2017)."""

    def __init__(self, in_channels: int, num_classes: int, *, width: int = 256, dropout: float = 0.1):
        super().__init__()
        self.dropout = dropout
        self.noise = width if dropout else 0
        self.conv = ConvNormReLU(in_channels, width, 3)
        self.classify = linear_classes(width, num_classes)

    def forward(self, x: Tensor, uniforms: Tensor | None = None) -> Tensor:
        """[b, C, h, w] -> [b, num_classes, h, w]; `uniforms` [b, noise]."""
        return self.classify(drop_channels(self.conv(x), uniforms, self.dropout))


def _need_four(channels: Sequence[int]) -> None:
    if len(channels) != 4:
        raise ValueError(f"UPerNet reads 4 maps, got {len(channels)}; choose 4 blocks")
