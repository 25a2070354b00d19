"""One query for every object: the assignment of least cost, as in DETR (Carion et al. 2020, section 3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

_WORST = 1e6


def match(cost: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs (query, object) of least total cost [q, n]: two int64 [min(q, n)], ascending by query.

    With more objects than queries, the most expensive objects get none.
    """
    # Non-finite weights give non-finite costs; any pairs will do then, and the loss itself shows the problem.
    finite = cost.detach().float().nan_to_num(nan=_WORST, posinf=_WORST, neginf=-_WORST)
    queries, objects = linear_sum_assignment(finite.cpu().numpy())
    return torch.as_tensor(queries, device=cost.device), torch.as_tensor(objects, device=cost.device)


def class_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the probability of every object's class: logits [q, K + 1] with the last for "no object" -> [q, n]."""
    return -logits.float().softmax(-1)[:, labels]


def focal_class_cost(logits: Tensor, labels: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss of a query for the object's class minus that for no class: logits [q, K] -> [q, n].

    Zhu et al. 2020 (Deformable DETR).
    """
    logits = logits.float()
    probability = logits.sigmoid()
    positive = alpha * (1 - probability) ** gamma * F.softplus(-logits)
    negative = (1 - alpha) * probability**gamma * F.softplus(logits)
    return (positive - negative)[:, labels]


def mask_cost(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Mean binary cross-entropy of every pair, at the same points for all: logits [q, p], targets [n, p] -> [q, n].

    Args:
        weights: of the points, [p].
    """
    logits, inside = logits.float(), targets.float() * weights
    outside = weights - inside
    return (F.softplus(-logits) @ inside.T + F.softplus(logits) @ outside.T) / weights.sum().clamp(min=1.0)


def dice_cost(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """One minus the smoothed Dice coefficient of every pair (Milletari et al. 2016): as `mask_cost`."""
    probability, inside = logits.float().sigmoid() * weights, targets.float()
    overlap = probability @ inside.T
    sizes = probability.sum(1)[:, None] + (inside * weights).sum(1)
    return 1 - (2 * overlap + 1) / (sizes + 1)


def box_costs(boxes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """L1 distance, and minus the generalized IoU (Rezatofighi et al. 2019), of every pair.

    Boxes [q, 4] and [n, 4] as (center x, center y, width, height) in parts of the image -> two [q, n].
    """
    boxes, targets = boxes.float(), targets.float()
    distance = (boxes[:, None] - targets).abs().sum(-1)
    corners = box_convert(boxes, "cxcywh", "xyxy"), box_convert(targets, "cxcywh", "xyxy")
    return distance, -generalized_box_iou(*corners)
