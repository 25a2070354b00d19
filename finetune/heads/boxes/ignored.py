"""Boxes inside regions where the truth is unknown: crowds, and objects whose annotation cannot be used.

As on COCO's server, a box is inside a region if at least half of its own area is.
"""

from __future__ import annotations

from torch import Tensor, cat

SHARE = 0.5
FAR = 1e6  # pixels


def inside(boxes: Tensor, regions: Tensor) -> Tensor:
    """bool [n]: whether half of each box [n, 4] is in one of the regions [m, 4], all as x1, y1, x2, y2."""
    low = boxes[:, None, :2].maximum(regions[None, :, :2])
    high = boxes[:, None, 2:].minimum(regions[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(dim=2)
    area = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1)
    return (shared >= SHARE * area[:, None]).any(dim=1) & (area > 0)


def beyond_borders(regions: Tensor, size: tuple[int, int]) -> Tensor:
    """Regions [m, 4] that reach a border of the image of `size` = (height, width), without an end there.

    An anchor may lie beyond the border for the most part.
    """
    border = regions.new_tensor([0, 0, size[1], size[0]])
    low, high = regions[:, :2] <= border[:2], regions[:, 2:] >= border[2:]
    return cat([regions[:, :2].where(~low, -FAR), regions[:, 2:].where(~high, FAR)], dim=1)
