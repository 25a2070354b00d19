"""Anchors at the exact strides of a pyramid, in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList


class Anchors(AnchorGenerator):
    """torchvision's anchors, of one size and several aspect ratios at every cell of a level.

    torchvision computes rounded strides from the sizes of image and map, and its anchors have the dtype of the maps:
    bf16 cannot represent every pixel above 256.

    Args:
        sizes: square roots of the areas in pixels, one for each level. ratios: height / width.
        strides: pixels per cell of each level.

    Raises:
        ValueError: the numbers of sizes and strides differ.
    """

    def __init__(self, sizes: Sequence[float], ratios: Sequence[float], strides: Sequence[float]):
        if len(sizes) != len(strides):
            raise ValueError(f"{len(sizes)} anchor sizes for {len(strides)} levels: give one for each")
        super().__init__(tuple((size,) for size in sizes), (tuple(ratios),) * len(sizes))
        self.strides = tuple(strides)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """The anchors of each image, fp32 [n, 4], the levels concatenated."""
        return [torch.cat(self.of_levels(feature_maps))] * len(image_list.image_sizes)

    def of_levels(self, feature_maps: list[Tensor]) -> list[Tensor]:
        """The anchors of each level, fp32 [n, 4]."""
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        steps = [[torch.tensor(float(stride), device=device)] * 2 for stride in self.strides]
        return self.grid_anchors([list(level.shape[-2:]) for level in feature_maps], steps)
