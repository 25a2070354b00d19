"""Three box heads in sequence, each trained on the boxes of the previous one at a higher overlap.

Cai and Vasconcelos 2018, "Cascade R-CNN"; class-agnostic boxes and averaged scores as in its reference code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou, clip_boxes_to_image

from finetune.heads.boxes.ignored import inside
from finetune.heads.boxes.roi_heads import BoxHead, RoIHeads, RoISizes, Target, box_losses

THRESHOLDS = (0.5, 0.6, 0.7)
WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))


class CascadeRoIHeads(RoIHeads):
    """`RoIHeads` with three box heads; masks are trained on the proposals and predicted for the last boxes."""

    def _build_boxes(self, channels: int, num_classes: int, sizes: RoISizes) -> None:
        self.box_heads = nn.ModuleList(BoxHead(channels, num_classes, sizes, agnostic=True) for _ in THRESHOLDS)
        self.coders = [BoxCoder(weights) for weights in WEIGHTS]

    def class_scores(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        stages = [self._read(stage, features, boxes, image_shapes)[0] for stage in range(len(THRESHOLDS))]
        return torch.stack([logits.softmax(-1) for logits in stages]).mean(0)

    def _box_losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        labels: list[Tensor],
        deltas: Sequence[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Sequence[Target],
    ) -> dict[str, Tensor]:
        losses = {}
        for stage in range(len(THRESHOLDS)):
            if stage > 0:
                labels, deltas = self._assign(stage, proposals, targets)
            logits, predicted = self._read(stage, features, proposals, image_shapes)
            by_class, by_box = box_losses(logits, predicted, torch.cat(labels), torch.cat(list(deltas)))
            losses |= {f"loss_classifier_{stage}": by_class, f"loss_box_reg_{stage}": by_box}
            if stage + 1 < len(THRESHOLDS):
                proposals = self._refine(stage, predicted.detach(), proposals, image_shapes)
        return losses

    def _detect(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        scores = []
        for stage in range(len(THRESHOLDS)):
            logits, deltas = self._read(stage, features, proposals, image_shapes)
            scores.append(logits.softmax(-1))
            proposals = self._refine(stage, deltas, proposals, image_shapes)
        mean = torch.stack(scores).mean(0)
        return self.select(torch.cat(proposals)[:, None], mean, [len(p) for p in proposals], image_shapes)

    def _read(
        self,
        stage: int,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[Tensor, Tensor]:
        pooled = self.box_roi_pool(features, proposals, image_shapes)
        if self.training:  # three heads share the pyramid: each contributes a third of its gradient
            share = 1 / len(THRESHOLDS)
            pooled = pooled * share + pooled.detach() * (1 - share)
        return self.box_heads[stage](pooled)

    def _refine(
        self, stage: int, deltas: Tensor, proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[Tensor]:
        boxes = (
            self.coders[stage].decode(deltas.flatten(1), proposals).reshape(-1, 4).split([len(p) for p in proposals])
        )
        return [clip_boxes_to_image(own, shape) for own, shape in zip(boxes, image_shapes, strict=True)]

    def _assign(
        self, stage: int, proposals: list[Tensor], targets: Sequence[Target]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Labels int64 [n] (-1: none) and deltas [n, 4] of each image's boxes at the overlap of this stage."""
        labels, matched = [], []
        for boxes, target in zip(proposals, targets, strict=True):
            if len(target["boxes"]):
                overlap, index = box_iou(boxes, target["boxes"].to(boxes)).max(dim=1)
                label = target["labels"][index] * (overlap >= THRESHOLDS[stage])
                matched.append(target["boxes"][index].to(boxes))
            else:
                label = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
                matched.append(boxes)
            if "ignored" in target:
                label = label.where((label > 0) | ~inside(boxes, target["ignored"].to(boxes)), -1)
            labels.append(label)
        return labels, list(self.coders[stage].encode(matched, proposals))
