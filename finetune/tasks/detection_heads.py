"""One interface of the heads that detect objects: from batches of `DetectionTrain` to `Detected`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune.data.coco import rle
from finetune.dense.contract import DenseBackbone
from finetune.heads.boxes import box_masks, rcnn_graph
from finetune.heads.boxes.box_loss import BoxSetLoss
from finetune.heads.boxes.rcnn import RCNN, RCNNSizes
from finetune.heads.boxes.roi_heads import RoISizes
from finetune.heads.queries.detr import DETR
from finetune.heads.queries.eomt import EoMT
from finetune.heads.queries.mask_instances import instances
from finetune.heads.queries.mask_loss import MaskSetLoss, MaskTargets
from finetune.heads.queries.query_decoder import QueryDecoder
from finetune.predictions import Detected
from finetune.tasks.configs.detection import DetectionConfig
from finetune.tasks.configs.detection_heads import DETRHead, EoMTHead, RCNNHead
from pretrain.models.export.outputs import ExportOutput

Pair = tuple[int, int]


class Head(nn.Module):
    """Base of the adapters.

    Attributes:
        noise: uniform random numbers per image that `losses` reads from the batch as "head".
        reads_crowds: `losses` reads "valid", the map of pixels outside crowds.
        detects, smallest_side: as of `Task`.
        example: the last of `Task.example_parts`.
    """

    noise = 0
    reads_crowds = False
    detects = False
    smallest_side = 0
    example: tuple[str, ...]

    @property
    def anchors(self) -> tuple[list[float], list[float]] | None:
        """Sides of the anchors in pixels, and their ratios (height / width); None without anchors."""
        return None

    def losses(self, dense: DenseBackbone, images: Tensor, batch: dict[str, Any], fraction: float) -> dict[str, Tensor]:
        """ "loss" and its terms, detached, of normalized images [b, 3, H, W], when `fraction` of the run is done."""
        raise NotImplementedError

    def predict(
        self, dense: DenseBackbone, images: Tensor, contents: Sequence[Pair], sizes: Sequence[Pair]
    ) -> list[Detected]:
        """Objects of each image in its original pixels, best first.

        Args:
            contents: (height, width) of the part of each image, at its top left, that is not padding. sizes: of the
                original.
        """
        raise NotImplementedError

    def export_outputs(self) -> tuple[ExportOutput, ...]:
        """As `Task.export_outputs`."""
        raise NotImplementedError

    def outputs(self, dense: DenseBackbone, images: Tensor, /) -> tuple[Tensor, ...]:
        """Normalized images [b, 3, H, W] -> the `export_outputs`, from which `predict` makes predictions."""
        raise NotImplementedError

    def detections(self, dense: DenseBackbone, images: Tensor, content: Tensor) -> tuple[Tensor, ...]:
        """As `Task.detections`, where the head `detects`."""
        raise NotImplementedError

    def predict_from(self, compute: Callable[..., tuple[Tensor, ...]]) -> None:
        """As `Task.predict_from`."""
        self.outputs = lambda _, images: compute(images)

    def prepare_export(self) -> None:
        """As `Task.prepare_export`."""

    def answer_facts(self) -> dict[str, Any]:
        """As `Task.answer_facts`."""
        return {}


class RCNNAdapter(Head):
    """Faster, Mask and Cascade R-CNN."""

    detects = True
    _graph: Callable[..., tuple[Tensor, ...]] | None = None

    def __init__(self, section: RCNNHead, dense: DenseBackbone, num_classes: int, max_detections: int):
        super().__init__()
        roi = RoISizes(
            batch=section.roi_batch,
            box_convs=section.box_convs,
            box_fcs=section.box_fcs,
            box_dim=section.box_dim,
            mask_convs=section.mask_convs,
            score_threshold=section.score_threshold,
            nms=section.nms,
            detections=max_detections,
            norm=section.norm,
        )
        sizes = RCNNSizes(
            channels=section.channels,
            scales=section.scales,
            anchors=section.anchors,
            ratios=section.ratios,
            rpn_convs=section.rpn_convs,
            rpn_batch=section.rpn_batch,
            before_nms=section.before_nms,
            proposals=section.proposals,
            roi=roi,
        )
        masks = section.name == "mask_rcnn"
        self.example = ("runs", "rcnn_masks") if masks else ("rcnn",)
        self.rcnn = RCNN(dense, num_classes, sizes=sizes, masks=masks, cascade=section.cascade)
        self.smallest_side = 2 * int(self.rcnn.strides[-1])  # torch.export takes a map of one cell for a constant

    @property
    def anchors(self) -> tuple[list[float], list[float]] | None:
        generator = self.rcnn.rpn.anchor_generator
        return [side for (side,) in generator.sizes], [*generator.aspect_ratios[0]]

    def losses(self, dense: DenseBackbone, images: Tensor, batch: dict[str, Any], fraction: float) -> dict[str, Tensor]:
        names = [name for name in ("boxes", "labels", "masks", "ignored") if name in batch]
        targets = [{name: batch[name][i] for name in names} for i in range(len(images))]
        return self.rcnn.losses(dense, images, targets, drop=batch.get("drop"))

    def predict(
        self, dense: DenseBackbone, images: Tensor, contents: Sequence[Pair], sizes: Sequence[Pair]
    ) -> list[Detected]:
        if self._graph is None:
            found = self.rcnn.predict(dense, images, sizes=contents)
        else:
            found = rcnn_graph.as_lists(*self._graph(images, torch.tensor(contents)))
        return [_on_original(*each) for each in zip(found, contents, sizes, strict=True)]

    def export_outputs(self) -> tuple[ExportOutput, ...]:
        outputs = (
            ExportOutput("boxes", "[batch, N, 4]: x1, y1, x2, y2 in pixels of the input; NMS is done, best first"),
            ExportOutput("scores", "[batch, N]: probabilities; 0 in rows after the last detection of an image"),
            ExportOutput("labels", "int64 [batch, N]: from 1 in the order of the classes; 0: no detection"),
        )
        masks = ExportOutput("masks", "[batch, N, 28, 28]: probabilities in equal cells of the boxes")
        return (*outputs, masks) if self.rcnn.roi_heads.has_mask() else outputs

    def detections(self, dense: DenseBackbone, images: Tensor, content: Tensor) -> tuple[Tensor, ...]:
        return rcnn_graph.detections(self.rcnn, dense, images, content)

    def predict_from(self, compute: Callable[..., tuple[Tensor, ...]]) -> None:
        self._graph = compute


class EoMTAdapter(Head):
    """Masks from queries in the backbone's last blocks."""

    reads_crowds = True
    example = ("runs", "scores", "eomt")

    def __init__(self, section: EoMTHead, dense: DenseBackbone, num_classes: int, max_detections: int):
        super().__init__()
        loss = MaskSetLoss(num_classes, **section.loss_arguments())
        self.eomt = EoMT(dense.blockwise(), loss, **section.head_arguments())
        self.noise, self.max_detections = self.eomt.noise, max_detections

    def losses(self, dense: DenseBackbone, images: Tensor, batch: dict[str, Any], fraction: float) -> dict[str, Tensor]:
        targets = [
            MaskTargets(labels - 1, masks, valid)
            for labels, masks, valid in zip(batch["labels"], batch["masks"], batch["valid"], strict=True)
        ]
        return self.eomt.losses(
            dense.blockwise(), images, targets, fraction=fraction, uniforms=batch["head"], drop=batch.get("drop")
        )

    def predict(
        self, dense: DenseBackbone, images: Tensor, contents: Sequence[Pair], sizes: Sequence[Pair]
    ) -> list[Detected]:
        masks, classes = self.outputs(dense, images)
        canvas = (images.shape[2], images.shape[3])
        return instances(
            masks, classes, canvas=canvas, contents=contents, sizes=sizes, max_detections=self.max_detections
        )

    def export_outputs(self) -> tuple[ExportOutput, ...]:
        return (
            ExportOutput("masks", "[batch, Q, h, w]: logits of the queries' masks"),
            ExportOutput("logits", "[batch, Q, K + 1]: of the classes, the last of them no object"),
        )

    def outputs(self, dense: DenseBackbone, images: Tensor, /) -> tuple[Tensor, ...]:
        return self.eomt.predict(dense.blockwise(), images)

    def prepare_export(self) -> None:
        self.eomt.stop_masking()

    def answer_facts(self) -> dict[str, Any]:
        return {"scores": "softmax", "most": self.max_detections}


class DETRAdapter(Head):
    """Boxes from the queries of a decoder."""

    example = ("scores", "detr")

    def __init__(self, section: DETRHead, dense: DenseBackbone, num_classes: int, max_detections: int):
        super().__init__()
        loss = BoxSetLoss(
            num_classes,
            classes=section.class_loss,
            class_weight=section.class_weight,
            l1_weight=section.l1_weight,
            giou_weight=section.giou_weight,
        )
        decoder = QueryDecoder(
            dense.channels[-1],
            loss.num_logits,
            num_queries=section.num_queries,
            width=section.width,
            depth=section.depth,
            num_heads=section.num_heads,
            prior=0.01 if section.class_loss == "focal" else None,
        )
        self.detr, self.max_detections = DETR(decoder, loss), max_detections

    def losses(self, dense: DenseBackbone, images: Tensor, batch: dict[str, Any], fraction: float) -> dict[str, Tensor]:
        names = [name for name in ("boxes", "labels", "ignored") if name in batch]
        targets = [{name: batch[name][i] for name in names} for i in range(len(images))]
        return self.detr.losses(dense, images, targets, drop=batch.get("drop"))

    def predict(
        self, dense: DenseBackbone, images: Tensor, contents: Sequence[Pair], sizes: Sequence[Pair]
    ) -> list[Detected]:
        boxes, logits = self.outputs(dense, images)
        covered, count = dense.covered(images), self.max_detections
        return self.detr.detections(
            boxes, logits, covered=covered, contents=contents, sizes=sizes, max_detections=count
        )

    def export_outputs(self) -> tuple[ExportOutput, ...]:
        return (
            ExportOutput("boxes", "[batch, Q, 4]: center x, center y, width, height in parts of the image"),
            ExportOutput("logits", "[batch, Q, logits]: of the classes"),
        )

    def outputs(self, dense: DenseBackbone, images: Tensor, /) -> tuple[Tensor, ...]:
        return self.detr(dense, images)[-1]

    def answer_facts(self) -> dict[str, Any]:
        scores = "sigmoid" if self.detr.loss.classes == "focal" else "softmax"
        return {"scores": scores, "most": self.max_detections}


def build(config: DetectionConfig, dense: DenseBackbone, num_classes: int) -> Head:
    """The head of the configuration, for the backbone of later calls.

    Raises:
        ValueError: the head does not fit the backbone.
    """
    adapters: dict[type, Any] = {RCNNHead: RCNNAdapter, EoMTHead: EoMTAdapter, DETRHead: DETRAdapter}
    return adapters[type(config.head)](config.head, dense, num_classes, config.max_detections)


def _on_original(found: dict[str, Tensor], content: Pair, size: Pair) -> Detected:
    """Detections within the `content` of a canvas, in the original image of `size` = (height, width)."""
    found = {name: value.float().cpu() if value.is_floating_point() else value.cpu() for name, value in found.items()}
    scale = torch.tensor([size[1] / content[1], size[0] / content[0]] * 2)
    boxes = torch.minimum(found["boxes"] * scale, torch.tensor([size[1], size[0]] * 2))
    masks = None
    if "masks" in found:  # one at a time: a hundred full-size masks of a large image need gigabytes
        pasted = (box_masks.paste_mask(mask, box, size) for mask, box in zip(found["masks"], boxes, strict=True))
        masks = [rle.encode(mask[None].numpy())[0] for mask in pasted]
    return Detected(boxes.numpy(), found["labels"].numpy().astype(np.int64), found["scores"].numpy(), masks)
