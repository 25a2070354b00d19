"""Anchors at the exact strides of a pyramid, in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList


class Anchors(AnchorGenerator):
    """torchvision's anchors, of one size and several aspect ratios at every place of a level.

    torchvision divides the image's size by that of the map, and rounds; and its anchors are of the maps' type, which in
    bf16 cannot tell pixels apart beyond 256.

    Args:
        sizes: square roots of the areas in pixels, one for each level. ratios: height / width.
        strides: pixels per place of each level.

    Raises:
        ValueError: as many sizes as strides are needed.
    """

    def __init__(self, sizes: Sequence[float], ratios: Sequence[float], strides: Sequence[float]):
        if len(sizes) != len(strides):
            raise ValueError(f"{len(sizes)} anchor sizes for {len(strides)} levels: give one for each")
        super().__init__(tuple((size,) for size in sizes), (tuple(ratios),) * len(sizes))
        self.strides = tuple(strides)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """The anchors of each image, fp32 [n, 4], all levels one after the other."""
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        steps = [[torch.tensor(float(stride), device=device)] * 2 for stride in self.strides]
        anchors = torch.cat(self.grid_anchors([list(level.shape[-2:]) for level in feature_maps], steps))
        return [anchors] * len(image_list.image_sizes)
