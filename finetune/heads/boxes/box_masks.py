"""Masks inside boxes (He et al. 2017, "Mask R-CNN", section 3): targets, loss, and pasting into the image.

Pixel (x, y) covers [x, x + 1) x [y, y + 1), here and in the pooling of features (`roi_pool`); a mask of m x m divides
its box into m x m equal cells.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align


def masks_in_boxes(masks: Tensor, boxes: Tensor, which: Tensor, size: int) -> Tensor:
    """Targets of a mask head: masks [m, H, W] of an image, cropped to boxes [n, 4] -> 0 or 1, [n, size, size].

    A cell is 1 where at least half of it is covered. `which`: the mask of each box, int64 [n].
    """
    if not len(boxes):
        return boxes.new_zeros(0, size, size)
    rois = torch.cat([which[:, None].float(), boxes.float()], dim=1)
    with torch.autocast(boxes.device.type, enabled=False):
        covered = roi_align(masks[:, None].float(), rois, size, aligned=True)
    return (covered[:, 0] >= 0.5).float()


def mask_loss(logits: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of the masks [n, K, m, m] of the true classes, int64 [n]; 0 if there are no masks."""
    if not len(labels):
        return logits.sum() * 0.0
    return F.binary_cross_entropy_with_logits(logits[torch.arange(len(labels), device=labels.device), labels], targets)


def paste_mask(mask: Tensor, box: Tensor, size: tuple[int, int], *, threshold: float = 0.5) -> Tensor:
    """The probabilities [m, m] of a box [4] (x1, y1, x2, y2 in pixels) as a bool mask [H, W] of an image of `size`.

    Bilinear at the pixels' centres; between the last cells and the edge of the box the mask fades to 0.
    """
    height, width = size
    full = torch.zeros(height, width, dtype=torch.bool, device=mask.device)
    x1, y1, x2, y2 = box.tolist()
    left, right = max(int(x1) - 1, 0), min(int(x2) + 2, width)
    top, bottom = max(int(y1) - 1, 0), min(int(y2) + 2, height)
    if right <= left or bottom <= top or x2 <= x1 or y2 <= y1:
        return full
    across = (torch.arange(left, right, device=mask.device) + 0.5 - x1) / (x2 - x1) * 2 - 1
    down = (torch.arange(top, bottom, device=mask.device) + 0.5 - y1) / (y2 - y1) * 2 - 1
    grid = torch.stack(torch.meshgrid(down, across, indexing="ij")[::-1], dim=-1).to(mask.dtype)
    values = F.grid_sample(mask[None, None], grid[None], align_corners=False)
    full[top:bottom, left:right] = values[0, 0] >= threshold
    return full
