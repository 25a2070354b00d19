"""Features of boxes, each read from the pyramid level that fits its size (Lin et al. 2017, section 4.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

CANONICAL = 224 / 16  # a box of 224 pixels is read at stride 16


class RoIPool(nn.Module):
    """Boxes [n, 4] of each image -> features [sum of n, C, size, size], aligned to the half pixel (He et al. 2017).

    torchvision's pooler infers strides that are powers of two; patches of 14 pixels have others.

    Args:
        strides: pixels per cell of each level, each twice the previous one. size: bins along a side.
    """

    def __init__(self, strides: Sequence[float], size: int):
        super().__init__()
        self.strides, self.size = tuple(strides), size

    def forward(
        self, features: Mapping[str, Tensor], boxes: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """`features`: the levels, finest first; levels beyond the strides are not read. `image_shapes` is not read."""
        index = torch.cat([box.new_full((len(box),), i) for i, box in enumerate(boxes)])
        return self.of_rows(features, index, torch.cat(list(boxes)))

    def of_rows(self, features: Mapping[str, Tensor], image: Tensor, boxes: Tensor) -> Tensor:
        """The same of boxes [n, 4] with the number of the image of each, [n]."""
        maps = list(features.values())[: len(self.strides)]
        rois = torch.cat([image[:, None].float(), boxes.float()], dim=1)
        levels = self.levels(rois[:, 1:])
        pooled = maps[0].new_zeros((rois.shape[0], maps[0].shape[1], self.size, self.size), dtype=torch.float32)
        # torchvision's RoIAlign computes in fp32, and so are the coordinates of the boxes.
        with torch.autocast(rois.device.type, enabled=False):
            for i, (level, stride) in enumerate(zip(maps, self.strides, strict=True)):
                at = torch.where(levels == i)[0]
                own = roi_align(level.float(), rois[at], self.size, 1 / stride, sampling_ratio=2, aligned=True)
                pooled[at] = own
        return pooled

    def levels(self, boxes: Tensor) -> Tensor:
        """The level of each box [n, 4], int64 [n]: the stride nearest below 1/14 of the square root of its area."""
        sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0).sqrt()
        steps = torch.log2(sides / CANONICAL + 1e-6) - math.log2(self.strides[0])
        return (steps + 1e-6).floor().clamp(0, len(self.strides) - 1).long()
