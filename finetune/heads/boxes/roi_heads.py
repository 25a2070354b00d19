"""The second half of Mask R-CNN: proposals to classes, boxes and masks (Ren et al. 2015; He et al. 2017).

torchvision's class assigns and samples proposals; losses and detections are written out here, so that other heads can
share them and that half precision does not reach the coordinates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads as TorchvisionRoIHeads
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, remove_small_boxes

from finetune.dense.simple_fpn import Norm
from finetune.heads.boxes import box_masks
from finetune.heads.boxes.ignored import inside
from finetune.heads.boxes.roi_pool import RoIPool

BOX_BINS, MASK_BINS = 7, 14
SMALLEST = 1e-2  # pixels of a side of a detection
Target = Mapping[str, Tensor]


@dataclass(frozen=True)
class RoISizes:
    """Sizes of the heads and the number of their proposals; the defaults are ViTDet's (Li et al. 2022).

    Attributes:
        batch: proposals per image in training, at most a quarter of them objects.
        box_convs, box_fcs, box_dim: convolutions, linear layers and their width, of the box head.
        mask_convs: convolutions of the mask head.
        score_threshold, nms, detections: the detections kept per image: lowest score, largest overlap, largest number.
    """

    batch: int = 512
    box_convs: int = 4
    box_fcs: int = 1
    box_dim: int = 1024
    mask_convs: int = 4
    score_threshold: float = 0.05
    nms: float = 0.5
    detections: int = 100
    norm: Norm = "layer"


class BoxHead(nn.Module):
    """Features of boxes [n, C, 7, 7] -> class logits [n, K + 1] (0: background) and deltas [n, K + 1 or 1, 4], fp32."""

    def __init__(self, channels: int, num_classes: int, sizes: RoISizes, *, agnostic: bool = False):
        super().__init__()
        norm: Any = None if sizes.norm == "none" else LayerNorm2d
        convs, fcs = [channels] * sizes.box_convs, [sizes.box_dim] * sizes.box_fcs
        self.layers = FastRCNNConvFCHead((channels, BOX_BINS, BOX_BINS), convs, fcs, norm_layer=norm)
        self.classes = nn.Linear(sizes.box_dim, num_classes + 1)
        self.deltas = nn.Linear(sizes.box_dim, 4 * (1 if agnostic else num_classes + 1))
        for layer, std in ((self.classes, 0.01), (self.deltas, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.layers(x)
        return self.classes(x).float(), self.deltas(x).float().unflatten(1, (-1, 4))


class RoIHeads(TorchvisionRoIHeads):
    """Pyramid and proposals to losses (training) or detections.

    Args:
        channels, strides: of the pyramid's levels. num_classes: without the background. masks: predict them too.
        threshold: smallest overlap (IoU) of a proposal with the object it is assigned to.
    """

    def __init__(
        self,
        channels: int,
        strides: Sequence[float],
        num_classes: int,
        sizes: RoISizes,
        *,
        masks: bool,
        threshold: float = 0.5,
    ):
        super().__init__(
            RoIPool(strides, BOX_BINS),
            None,
            None,
            threshold,
            threshold,
            sizes.batch,
            0.25,
            None,
            sizes.score_threshold,
            sizes.nms,
            sizes.detections,
        )
        self.num_classes, self.threshold = num_classes, threshold
        self._build_boxes(channels, num_classes, sizes)
        if masks:
            norm: Any = None if sizes.norm == "none" else LayerNorm2d
            self.mask_roi_pool = RoIPool(strides, MASK_BINS)
            self.mask_head = MaskRCNNHeads(channels, [channels] * sizes.mask_convs, 1, norm_layer=norm)
            self.mask_predictor = MaskRCNNPredictor(channels, channels, num_classes + 1)

    def _build_boxes(self, channels: int, num_classes: int, sizes: RoISizes) -> None:
        self.box_head = BoxHead(channels, num_classes, sizes)

    def forward(  # type: ignore[override]
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Sequence[Target] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """(detections of each image, empty in training; losses by name, empty in evaluation).

        A detection has boxes [n, 4], labels int64 [n] from 1, scores [n], best first, and masks [n, 28, 28],
        probabilities within the boxes.
        """
        if not self.training:
            found = self._detect(features, proposals, image_shapes)
            return [self._with_masks(features, one, image_shapes, i) for i, one in enumerate(found)], {}
        assert targets is not None, "training needs targets"
        proposals = [self._not_ignored(*pair) for pair in zip(proposals, targets, strict=True)]
        proposals, matched, labels, deltas = self.select_training_samples(proposals, list(targets))  # type: ignore[arg-type]
        losses = self._box_losses(features, proposals, labels, deltas, image_shapes, targets)
        if self.has_mask():
            losses["loss_mask"] = self._mask_loss(features, proposals, matched, labels, image_shapes, targets)
        return [], losses

    def _not_ignored(self, proposals: Tensor, target: Target) -> Tensor:
        """Without the proposals that would be background inside ignored regions."""
        if "ignored" not in target or not len(target["ignored"]):
            return proposals
        kept = ~inside(proposals, target["ignored"].to(proposals))
        if len(target["boxes"]):
            kept |= box_iou(proposals, target["boxes"].to(proposals)).amax(dim=1) >= self.threshold
        return proposals[kept]

    def class_scores(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Probabilities [n, K + 1] of the classes of given boxes, which stay where they are; 0 is the background."""
        return self.box_head(self.box_roi_pool(features, boxes, image_shapes))[0].softmax(-1)

    def _box_losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        labels: list[Tensor],
        deltas: Sequence[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Sequence[Target],
    ) -> dict[str, Tensor]:
        logits, predicted = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        by_class, by_box = box_losses(logits, predicted, torch.cat(labels), torch.cat(list(deltas)))
        return {"loss_classifier": by_class, "loss_box_reg": by_box}

    def _detect(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        logits, deltas = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        boxes = self.box_coder.decode(deltas.flatten(1), proposals)
        return self.select(boxes, logits.softmax(-1), [len(p) for p in proposals], image_shapes)

    def select(
        self, boxes: Tensor, scores: Tensor, counts: list[int], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """The best boxes of each image, without those that overlap a better one of their class.

        Args:
            boxes: [n, K + 1 or 1, 4] of all images together. scores: [n, K + 1]. counts: n of each image.
        """
        found = []
        for own, score, shape in zip(boxes.split(counts), scores.split(counts), image_shapes, strict=True):
            score = score[:, 1:]
            row, column = torch.where(score > self.score_thresh)
            own = own[row, column + 1 if own.shape[1] > 1 else 0]
            kept = clip_boxes_to_image(own, shape)
            score, label = score[row, column], column + 1
            large = remove_small_boxes(kept, SMALLEST)
            kept, score, label = kept[large], score[large], label[large]
            best = batched_nms(kept, score, label, self.nms_thresh)[: self.detections_per_img]
            found.append({"boxes": kept[best], "labels": label[best], "scores": score[best]})
        return found

    def _mask_loss(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        matched: list[Tensor],
        labels: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Sequence[Target],
    ) -> Tensor:
        objects = [label > 0 for label in labels]
        boxes = [box[chosen] for box, chosen in zip(proposals, objects, strict=True)]
        logits = self._mask_logits(features, boxes, image_shapes)
        wanted = [
            box_masks.masks_in_boxes(target["masks"], box, index[chosen], logits.shape[-1])
            for target, index, chosen, box in zip(targets, matched, objects, boxes, strict=True)
        ]
        return box_masks.mask_loss(
            logits, torch.cat(wanted), torch.cat([x[o] for x, o in zip(labels, objects, strict=True)])
        )

    def _with_masks(
        self, features: dict[str, Tensor], found: dict[str, Tensor], image_shapes: list[tuple[int, int]], i: int
    ) -> dict[str, Tensor]:
        if not self.has_mask():
            return found
        # One image at a time: a hundred detections with maps of 28 x 28 for every class are large.
        maps = {name: level[i : i + 1] for name, level in features.items()}
        logits = self._mask_logits(maps, [found["boxes"]], [image_shapes[i]])
        chosen = logits[torch.arange(len(logits), device=logits.device), found["labels"]]
        return {**found, "masks": chosen.sigmoid()}

    def _mask_logits(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        pool, head, predictor = self.mask_roi_pool, self.mask_head, self.mask_predictor
        assert pool is not None and head is not None and predictor is not None
        return predictor(head(pool(features, boxes, image_shapes))).float()


def box_losses(logits: Tensor, deltas: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of all proposals, and smooth L1 of the objects' deltas, both divided by the number of proposals.

    Args:
        logits: [n, K + 1]. deltas: [n, K + 1 or 1, 4]. labels: int64 [n], 0 for the background, -1 for none. targets:
            [n, 4].
    """
    objects = torch.where(labels > 0)[0]
    own = deltas[objects, labels[objects] if deltas.shape[1] > 1 else 0]
    count = max(len(labels), 1)
    by_class = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-1) / count
    return by_class, F.smooth_l1_loss(own, targets[objects], beta=1 / 9, reduction="sum") / count
