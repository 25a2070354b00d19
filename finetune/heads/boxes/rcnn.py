"""Faster and Mask R-CNN on the maps of any backbone (Ren et al. 2015; He et al. 2017; on plain ones Li et al. 2022).

torchvision's parts in classes of our own: the backbone gets the random numbers of its stochastic depth, strides are
exact, and coordinates are fp32 in every precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from finetune.dense.contract import DenseBackbone
from finetune.dense.pyramid import pyramid
from finetune.heads.boxes.anchors import Anchors
from finetune.heads.boxes.cascade import CascadeRoIHeads
from finetune.heads.boxes.ignored import beyond_borders, inside
from finetune.heads.boxes.roi_heads import RoIHeads, RoISizes, Target


@dataclass(frozen=True)
class RCNNSizes:
    """Sizes of the pyramid and the proposal network; the defaults are ViTDet's.

    Attributes:
        channels: of the pyramid.
        scales: of its levels relative to the map of a plain backbone; a hierarchical one has a level for each stage.
            One more level, of half the last size, is for proposals only.
        anchors: square roots of the areas in pixels, one for each level; None: 8 times the strides.
        ratios: height / width of the anchors.
        rpn_convs: convolutions of the proposal network. rpn_batch: anchors per image in training.
        before_nms: proposals per level. proposals: per image, after NMS. Each is (in training, in inference).
        roi: of the heads on the proposals.
    """

    channels: int = 256
    scales: Sequence[float] = (4, 2, 1, 0.5)
    anchors: Sequence[float] | None = None
    ratios: Sequence[float] = (0.5, 1.0, 2.0)
    rpn_convs: int = 2
    rpn_batch: int = 256
    before_nms: tuple[int, int] = (2000, 1000)
    proposals: tuple[int, int] = (1000, 1000)
    roi: RoISizes = field(default_factory=RoISizes)


class RCNN(nn.Module):
    """Boxes, and masks within them; the backbone (a `DenseBackbone`) is an argument of every call.

    Args:
        dense: the backbone it will be called with. num_classes: without the background.
        masks: Mask R-CNN. cascade: three box heads, each refining the boxes of the previous one (see `cascade`).

    Attributes:
        strides: of all levels in pixels, the last for proposals only.

    Raises:
        ValueError: the anchor sizes do not fit the levels.
    """

    def __init__(
        self,
        dense: DenseBackbone,
        num_classes: int,
        *,
        sizes: RCNNSizes | None = None,
        masks: bool = True,
        cascade: bool = False,
    ):
        super().__init__()
        sizes = sizes or RCNNSizes()
        self.neck = pyramid(dense, sizes.channels, scales=sizes.scales, norm=sizes.roi.norm)
        strides = self.neck.strides
        levels = self.strides = [*strides, strides[-1] * 2]
        anchors = [8 * stride for stride in levels] if sizes.anchors is None else sizes.anchors
        self.rpn = _ProposalNetwork(
            Anchors(anchors, sizes.ratios, levels),
            _RPNHead(sizes.channels, len(sizes.ratios), sizes.rpn_convs),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=sizes.rpn_batch,
            positive_fraction=0.5,
            pre_nms_top_n=_by_mode(sizes.before_nms),
            post_nms_top_n=_by_mode(sizes.proposals),
            nms_thresh=0.7,
        )
        kind = CascadeRoIHeads if cascade else RoIHeads
        self.roi_heads = kind(sizes.channels, strides, num_classes, sizes.roi, masks=masks)

    def losses(
        self,
        dense: DenseBackbone,
        images: Tensor,
        targets: Sequence[Target],
        *,
        sizes: Sequence[tuple[int, int]] | None = None,
        drop: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """ "loss" and, detached, its terms by torchvision's names. In training mode only.

        Anchors and proposals are sampled by torch's generator of the device.

        Args:
            images: normalized [b, C, H, W].
            targets: of each image boxes fp32 [n, 4] (x1, y1, x2, y2 in pixels), labels int64 [n] from 1, and masks
                [n, H, W]; n may be 0. Where there is "ignored", fp32 [m, 4], boxes inside these regions (see `ignored`)
                are no background.
            sizes: (height, width) of each image within the padded batch; None: no padding.
            drop: as in `DenseBackbone.forward`.
        """
        assert self.training, "losses of a model in evaluation mode"
        listed = _listed(images, sizes)
        targets = [
            {**target, "ignored": beyond_borders(target["ignored"].float(), size)} if "ignored" in target else target
            for target, size in zip(targets, listed.image_sizes, strict=True)
        ]
        features = self.features(dense, images, drop)
        proposals, first = self.rpn(listed, features, list(targets))
        _, second = self.roi_heads(features, proposals, listed.image_sizes, targets)
        terms = first | second
        return {"loss": sum(terms.values()), **{name: term.detach() for name, term in terms.items()}}  # type: ignore[dict-item]

    def predict(
        self, dense: DenseBackbone, images: Tensor, *, sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[dict[str, Tensor]]:
        """Of each image boxes [n, 4] within its size, labels int64 [n] from 1, scores [n], best first, and masks
        [n, 28, 28], probabilities within the boxes (see `box_masks.paste_mask`). In evaluation mode only."""
        assert not self.training, "predictions of a model in training mode"
        listed = _listed(images, sizes)
        features = self.features(dense, images)
        proposals, _ = self.rpn(listed, features)
        return self.roi_heads(features, proposals, listed.image_sizes)[0]

    def features(self, dense: DenseBackbone, images: Tensor, drop: Tensor | None = None) -> dict[str, Tensor]:
        """The levels of the pyramid by number, finest first; the last is for proposals only."""
        levels = self.neck(dense(images, drop))
        levels.append(F.max_pool2d(levels[-1], 1, stride=2))
        return {str(i): level for i, level in enumerate(levels)}


class _ProposalNetwork(RegionProposalNetwork):
    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        labels, matched = super().assign_targets_to_anchors(anchors, targets)
        for label, boxes, target in zip(labels, anchors, targets, strict=True):
            if "ignored" in target:
                label[(label == 0) & inside(boxes, target["ignored"])] = -1  # neither object nor background
        return labels, matched

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        if not any(bool((label >= 0).any()) for label in labels):  # the mean over no anchor is not a number
            return objectness.sum() * 0, pred_bbox_deltas.sum() * 0
        return super().compute_loss(objectness, pred_bbox_deltas, labels, regression_targets)


class _RPNHead(RPNHead):
    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [level.float() for level in logits], [level.float() for level in deltas]


def _by_mode(counts: tuple[int, int]) -> dict[str, int]:
    return {"training": counts[0], "testing": counts[1]}


def _listed(images: Tensor, sizes: Sequence[tuple[int, int]] | None) -> ImageList:
    whole = (images.shape[2], images.shape[3])
    return ImageList(images, [whole] * len(images) if sizes is None else list(sizes))
