"""The pyramid of a dense backbone: from the one map of a plain one, or from the stages of a hierarchical one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from timm.layers import LayerNorm2d  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from finetune.dense.contract import DenseBackbone
from finetune.dense.simple_fpn import Norm, SimpleFPN


class HierarchicalFPN(nn.Module):
    """Maps of several strides -> as many maps of `out_channels` (Lin et al. 2017, "Feature Pyramid Networks").

    Attributes:
        strides: of each level in pixels.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[float], out_channels: int, *, norm: Norm = "layer"):
        super().__init__()
        self.strides, self.out_channels = list(strides), out_channels
        layer = None if norm == "none" else LayerNorm2d
        self.fpn = FeaturePyramidNetwork(list(channels), out_channels, norm_layer=layer)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return list(self.fpn(OrderedDict((str(i), level) for i, level in enumerate(maps))).values())


class PlainFPN(SimpleFPN):
    """`SimpleFPN` of the last map of a backbone.

    Attributes:
        strides: of each level in pixels.
    """

    def __init__(
        self, in_channels: int, stride: int, out_channels: int, *, scales: Sequence[float], norm: Norm = "layer"
    ):
        super().__init__(in_channels, out_channels, scales, norm)
        self.strides = [stride / scale for scale in scales]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:  # type: ignore[override]
        return super().forward(maps[-1])


def pyramid(
    dense: DenseBackbone, out_channels: int, *, scales: Sequence[float] = (4, 2, 1, 0.5), norm: Norm = "layer"
) -> PlainFPN | HierarchicalFPN:
    """Maps of `dense` to levels of `out_channels`, finest first, each half the size of the previous one.

    `scales` are for a plain backbone, whose last map is read.
    """
    if len(set(dense.strides)) < len(dense.strides) or len(dense.strides) == 1:
        return PlainFPN(dense.channels[-1], dense.strides[-1], out_channels, scales=scales, norm=norm)
    return HierarchicalFPN(dense.channels, dense.strides, out_channels, norm=norm)
