"""Faster, Mask and Cascade R-CNN in tensors of fixed shape, as a graph expresses them: what `RCNN.predict` computes.

torchvision's lists have as many proposals and detections as an image gives, which a graph cannot loop over. Here all
images of a batch are in one list of boxes, with the number of their image, and the result has the same number of rows
for each image.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import nms

from finetune.dense.contract import DenseBackbone
from finetune.heads.boxes.cascade import THRESHOLDS, CascadeRoIHeads
from finetune.heads.boxes.rcnn import RCNN
from finetune.heads.boxes.roi_heads import SMALLEST, RoIHeads

_NONE = -torch.inf  # the score of what is no box


class Proposals(NamedTuple):
    """boxes: fp32 [n, 4]. image, place: int64 [n], the image of each in the batch, and its number among those of it."""

    boxes: Tensor
    image: Tensor
    place: Tensor


def detections(rcnn: RCNN, dense: DenseBackbone, images: Tensor, content: Tensor) -> tuple[Tensor, ...]:
    """boxes fp32 [b, d, 4] in pixels, scores [b, d], labels int64 [b, d] from 1, and of Mask R-CNN masks
    [b, d, 28, 28], probabilities within the boxes; best first, rows without a detection are 0. In evaluation mode only.

    Args:
        images: normalized [b, C, H, W]. content: int64 [b, 2], (height, width) of the part of each image, at its top
            left, that is not padding; the boxes are within it.
    """
    features, heads = rcnn.features(dense, images), rcnn.roi_heads
    borders = content.flip(1).repeat(1, 2).float()  # x, y, x, y
    side = max(images.shape[2], images.shape[3]) + 1
    proposals = _proposals(rcnn.rpn, list(features.values()), borders, side)
    if isinstance(heads, CascadeRoIHeads):
        boxes, scores = _refined(heads, features, proposals, borders)
    else:
        boxes, scores = _decoded(heads, features, proposals)
    found = _best(heads, boxes, scores, proposals, borders, side, rcnn.rpn.post_nms_top_n())
    return (*found, _masks(heads, features, *found)) if heads.has_mask() else found


def as_lists(boxes: Tensor, scores: Tensor, labels: Tensor, masks: Tensor | None = None) -> list[dict[str, Tensor]]:
    """The rows of each image that are detections, as `RCNN.predict` gives them."""
    named = {"boxes": boxes, "scores": scores, "labels": labels} | ({} if masks is None else {"masks": masks})
    return [
        {name: value[i, :count] for name, value in named.items()}
        for i, count in enumerate((scores > 0).sum(1).tolist())
    ]


def _proposals(rpn: Any, maps: list[Tensor], borders: Tensor, side: int) -> Proposals:
    boxes, scores = [], []
    for logit, delta, anchors in zip(*rpn.head(maps), rpn.anchor_generator.of_levels(maps), strict=True):
        logit = logit.permute(0, 2, 3, 1).flatten(1)
        delta = delta.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
        logit, at = _top(logit, rpn.pre_nms_top_n())
        own = rpn.box_coder.decode_single(_rows(delta, at).flatten(0, 1), anchors[at.flatten()]).unflatten(0, at.shape)
        own = _clipped(own, borders[:, None])
        image, place = torch.where((logit > _NONE) & _large(own, rpn.min_size))
        kept = nms(own[image, place] + _apart(image, side), logit[image, place], rpn.nms_thresh)
        image, place = image[kept], place[kept]
        scores.append(torch.full_like(logit, _NONE).index_put((image, place), logit[image, place]))
        boxes.append(own)
    best, at = _top(torch.cat(scores, 1), rpn.post_nms_top_n())
    image, place = torch.where(best > _NONE)
    return Proposals(_rows(torch.cat(boxes, 1), at)[image, place], image, place)


def _decoded(heads: RoIHeads, features: dict[str, Tensor], found: Proposals) -> tuple[Tensor, Tensor]:
    """Boxes [n, K or 1, 4] and scores [n, K] of the classes."""
    logits, deltas = heads.box_head(heads.box_roi_pool.of_rows(features, found.image, found.boxes))
    boxes = heads.box_coder.decode_single(deltas[:, 1:].flatten(1), found.boxes)
    return boxes.unflatten(1, (-1, 4)), logits.softmax(-1)[:, 1:]


def _refined(
    heads: CascadeRoIHeads, features: dict[str, Tensor], found: Proposals, borders: Tensor
) -> tuple[Tensor, Tensor]:
    """As `_decoded`, of the three heads of a cascade."""
    boxes, scores = found.boxes, []
    for stage in range(len(THRESHOLDS)):
        pooled = heads.box_roi_pool.of_rows(features, found.image, boxes)
        logits, deltas = heads.box_heads[stage](pooled)
        scores.append(logits.softmax(-1))
        boxes = _clipped(heads.coders[stage].decode_single(deltas.flatten(1), boxes), borders[found.image])
    return boxes[:, None], torch.stack(scores).mean(0)[:, 1:]


def _best(
    heads: RoIHeads, boxes: Tensor, scores: Tensor, found: Proposals, borders: Tensor, side: int, places: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best boxes, scores and labels of each image, of boxes [n, K or 1, 4] and scores [n, K] of its proposals."""
    classes = scores.shape[1]
    boxes = _clipped(boxes, borders[found.image][:, None])
    row, label = torch.where((scores > heads.score_thresh) & _large(boxes, SMALLEST))
    boxes = boxes[row, label if boxes.shape[1] > 1 else 0]
    image, score = found.image[row], scores[row, label]
    across = math.ceil(math.sqrt(classes))  # classes and images in a grid: far from 0, fp32 rounds coordinates
    group = image * across + label // across
    kept = nms(boxes + _apart(group, side, label % across), score, heads.nms_thresh)
    cell = image[kept], found.place[row[kept]] * classes + label[kept]
    table = scores.new_zeros(borders.shape[0], places * classes)
    best, at = table.index_put(cell, score[kept]).topk(min(heads.detections_per_img, places * classes))
    which = torch.full_like(table, -1, dtype=torch.int64).index_put(cell, kept).gather(1, at)
    # -1 is the row after the last: there may be no box at all
    boxes = torch.cat([boxes, boxes.new_zeros(1, 4)])[which]
    labels = torch.cat([label + 1, label.new_zeros(1)])[which]
    return boxes, best, labels


def _masks(heads: Any, features: dict[str, Tensor], boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    image, place = torch.where(scores > 0)
    pooled = heads.mask_roi_pool.of_rows(features, image, boxes[image, place])
    logits = heads.mask_predictor(heads.mask_head(pooled)).float()
    own = labels[image, place][:, None, None, None].expand(-1, -1, *logits.shape[2:])
    masks = logits.new_zeros(*scores.shape, *logits.shape[2:])
    return masks.index_put((image, place), logits.gather(1, own)[:, 0].sigmoid())


def _top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest of scores [b, n] and their columns; what is missing is no box, of the last column."""
    last = scores.shape[1] - 1
    filled = torch.nn.functional.pad(scores, (0, count), value=_NONE)
    best, at = filled.topk(count)
    return best, at.clamp(max=last)


def _rows(values: Tensor, at: Tensor) -> Tensor:
    """Of values [b, n, 4] the rows `at` [b, m]."""
    return values.gather(1, at[..., None].expand(-1, -1, values.shape[2]))


def _clipped(boxes: Tensor, borders: Tensor) -> Tensor:
    return torch.minimum(boxes.clamp(min=0), borders)


def _large(boxes: Tensor, side: float) -> Tensor:
    return ((boxes[..., 2:] - boxes[..., :2]) >= side).all(-1)


def _apart(down: Tensor, side: int, across: Tensor | None = None) -> Tensor:
    """Shifts [n, 4] of boxes in images of at most `side` pixels that keep those of different groups apart."""
    across = torch.zeros_like(down) if across is None else across
    return torch.stack([across, down, across, down], 1).float() * side
