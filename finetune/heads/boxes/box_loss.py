"""The loss of a set of boxes: every object is assigned to one query, by least cost (DETR, Carion et al. 2020).

Classes use the focal loss (Lin et al. 2017) as in Deformable DETR (Zhu et al. 2020), or cross-entropy with a class
"no object" as in DETR; boxes use L1 and generalized IoU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss

from finetune.heads.boxes.ignored import inside
from finetune.heads.queries import matcher
from pretrain.core import distributed

_NO_LOSS = -1  # the class of a query without an object, in an ignored region
ClassLoss = Literal["focal", "ce"]


@dataclass(frozen=True)
class BoxTargets:
    """The objects of one image: labels int64 [n] from 0; boxes [n, 4] as (center x, center y, width, height) in parts
    of the image; ignored: regions [m, 4], as the boxes, where the truth is unknown."""

    labels: Tensor
    boxes: Tensor
    ignored: Tensor | None = None

    @classmethod
    def of_pixels(
        cls, labels: Tensor, boxes: Tensor, size: tuple[int, int], ignored: Tensor | None = None
    ) -> BoxTargets:
        """Boxes [n, 4], and regions, as x1, y1, x2, y2 in pixels of an image of `size` = (height, width)."""
        scale = boxes.new_tensor([size[1], size[0], size[1], size[0]])
        regions = None if ignored is None else box_convert(ignored.float() / scale, "xyxy", "cxcywh")
        return cls(labels, box_convert(boxes.float() / scale, "xyxy", "cxcywh"), regions)


@dataclass(frozen=True)
class BoxSetLoss:
    """The loss with its weights; `no_object_weight` is of the class "no object" under cross-entropy."""

    num_classes: int
    classes: ClassLoss = "focal"
    class_weight: float = 2.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    no_object_weight: float = 0.1

    @property
    def num_logits(self) -> int:
        """Class logits of a query: one more than the classes under cross-entropy."""
        return self.num_classes + (self.classes == "ce")

    def __call__(self, predictions: list[tuple[Tensor, Tensor]], targets: list[BoxTargets]) -> dict[str, Tensor]:
        """The loss summed over all `predictions`, each matched separately; the terms of the last one; and
        "without_query", the number of objects per image that exceed the queries.

        Args:
            predictions: of every layer: boxes [b, q, 4] in the form of the targets, class logits [b, q, num_logits].

        Raises:
            ValueError: a label is not one of the classes, or the numbers of labels and boxes differ.
        """
        self._check(targets)
        objects, classes = self._counts(predictions[0][0], targets)
        total, terms = predictions[0][0].new_zeros(()), {}
        for layer in predictions:
            terms = self._of_layer(*layer, targets, objects, classes)
            total = total + self.class_weight * terms["class"] + self.l1_weight * terms["l1"]
            total = total + self.giou_weight * terms["giou"]
        queries = predictions[0][0].shape[1]
        over = sum(max(len(target.labels) - queries, 0) for target in targets)
        without = total.new_tensor(over / len(targets))
        return {"loss": total, **{name: value.detach() for name, value in terms.items()}, "without_query": without}

    def scores(self, logits: Tensor) -> Tensor:
        """Class logits [..., num_logits] -> scores [..., K] in [0, 1]."""
        return logits.float().sigmoid() if self.classes == "focal" else logits.float().softmax(-1)[..., :-1]

    def _of_layer(
        self, boxes: Tensor, logits: Tensor, targets: list[BoxTargets], count: Tensor, classes: Tensor
    ) -> dict[str, Tensor]:
        boxes, logits = boxes.float(), logits.float()
        expected = torch.full(logits.shape[:2], self.num_classes, device=logits.device)
        chosen, wanted = [], []
        for i, target in enumerate(targets):
            queries, objects = self._match(boxes[i], logits[i], target)
            expected[i, queries] = target.labels[objects]
            chosen.append(boxes[i].index_select(0, queries))
            wanted.append(target.boxes[objects].float())
            if target.ignored is not None and len(target.ignored):
                corners = box_convert(boxes[i].detach(), "cxcywh", "xyxy")
                unknown = inside(corners, box_convert(target.ignored.to(corners), "cxcywh", "xyxy"))
                expected[i] = expected[i].where(~unknown | (expected[i] < self.num_classes), _NO_LOSS)
        if any(target.ignored is not None for target in targets):
            logits, expected = _known(logits, expected)
        found, true = torch.cat(chosen), torch.cat(wanted)
        corners = box_convert(found, "cxcywh", "xyxy"), box_convert(true, "cxcywh", "xyxy")
        return {
            "class": self._class_loss(logits, expected) / (count if self.classes == "focal" else classes),
            "l1": (found - true).abs().sum() / count,
            "giou": generalized_box_iou_loss(*corners, reduction="sum") / count,
        }

    @torch.no_grad()
    def _match(self, boxes: Tensor, logits: Tensor, target: BoxTargets) -> tuple[Tensor, Tensor]:
        of_class = matcher.focal_class_cost if self.classes == "focal" else matcher.class_cost
        distance, overlap = matcher.box_costs(boxes, target.boxes)
        cost = self.class_weight * of_class(logits, target.labels) + self.l1_weight * distance
        return matcher.match(cost + self.giou_weight * overlap)

    def _class_loss(self, logits: Tensor, expected: Tensor) -> Tensor:
        if self.classes == "ce":
            weights = logits.new_ones(self.num_classes + 1)
            weights[-1] = self.no_object_weight
            return F.cross_entropy(logits.flatten(0, 1), expected.flatten(), weights, reduction="sum")
        one_hot = F.one_hot(expected, self.num_classes + 1)[..., :-1].to(logits.dtype)
        return sigmoid_focal_loss(logits, one_hot, reduction="sum")

    def _counts(self, boxes: Tensor, targets: list[BoxTargets]) -> tuple[Tensor, Tensor]:
        """Divisors of the sums over boxes and over queries, such that the mean over ranks is that of one rank."""
        queries = boxes.shape[1]
        objects = sum(min(len(target.labels), queries) for target in targets)
        classes = objects + self.no_object_weight * (len(targets) * queries - objects)
        counts = torch.tensor([objects, classes], dtype=torch.float32, device=boxes.device)
        counts = distributed.all_reduce_sum(counts)
        # A batch without objects still has the focal loss of its queries: divided by 1, as with one object.
        return counts[0].clamp(min=1.0) / distributed.world_size(), counts[1] / distributed.world_size()

    def _check(self, targets: list[BoxTargets]) -> None:
        for i, target in enumerate(targets):
            if len(target.labels) != len(target.boxes):
                raise ValueError(f"image {i} of the batch: {len(target.labels)} labels for {len(target.boxes)} boxes")
            if len(target.labels) and not 0 <= int(target.labels.min()) <= int(target.labels.max()) < self.num_classes:
                found = sorted(set(target.labels.tolist()))
                raise ValueError(f"image {i} of the batch: labels {found}, but the head has {self.num_classes} classes")


def _known(logits: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [b, q, c] and classes [b, q] of the queries whose class is known, as [1, n, c] and [1, n]."""
    known = expected != _NO_LOSS
    return logits[known][None], expected[known][None]
