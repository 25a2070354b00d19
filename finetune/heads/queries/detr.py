"""A set of boxes for each image: the decoder of queries on the last map of any backbone, with its loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from finetune.heads.boxes.box_loss import BoxSetLoss, BoxTargets
from finetune.heads.queries.query_decoder import QueryDecoder
from finetune.predictions import Detected


class DETR(nn.Module):
    """The decoder and its loss; the backbone (images -> maps, with `strides`) is an argument of every call.

    Attributes:
        noise: uniforms per image that `losses` spends: none.
    """

    noise = 0

    def __init__(self, decoder: QueryDecoder, loss: BoxSetLoss):
        super().__init__()
        self.decoder, self.loss = decoder, loss

    def forward(
        self, dense: Any, images: Tensor, *, drop: Tensor | None = None
    ) -> tuple[list[tuple[Tensor, Tensor]], tuple[int, int]]:
        """Images [b, C, H, W] -> (boxes [b, q, 4], class logits) of each layer, and what the boxes are parts of:
        (height, width) in pixels that the map covers, whole patches."""
        features = dense(images, drop)[-1]
        stride = dense.strides[-1]
        return self.decoder(features), (features.shape[2] * stride, features.shape[3] * stride)

    def losses(
        self, dense: Any, images: Tensor, targets: list[dict[str, Tensor]], *, drop: Tensor | None = None
    ) -> dict[str, Tensor]:
        """ "loss"; its terms "class", "l1" and "giou" in the last layer; "without_query", see `BoxSetLoss`.

        Args:
            targets: of each image, as torchvision's detectors take them: "labels" int64 [n] from 1 and "boxes" [n, 4]
                as x1, y1, x2, y2 in pixels.

        Raises:
            ValueError: a label is not one of the classes.
        """
        layers, size = self(dense, images, drop=drop)
        return self.loss(layers, [BoxTargets.of_pixels(each["labels"] - 1, each["boxes"], size) for each in targets])

    def predict(
        self,
        dense: Any,
        images: Tensor,
        *,
        contents: Sequence[tuple[int, int]],
        sizes: Sequence[tuple[int, int]],
        max_detections: int = 100,
    ) -> list[Detected]:
        """The best `max_detections` of each image, in the pixels of the original.

        Args:
            contents: (height, width) of the part of each image, at its top left, that is not padding.
            sizes: (height, width) of the original images.
        """
        layers, (covered_height, covered_width) = self(dense, images)
        boxes, scores = layers[-1][0].float(), self.loss.scores(layers[-1][1])
        found = []
        for i, ((high, wide), (height, width)) in enumerate(zip(contents, sizes, strict=True)):
            best, queries, labels = best_pairs(scores[i], max_detections)
            zoom = boxes.new_tensor([covered_width * width / wide, covered_height * height / high] * 2)
            limits = boxes.new_tensor([width, height] * 2)
            corners = torch.minimum((box_convert(boxes[i, queries], "cxcywh", "xyxy") * zoom).clamp(min=0), limits)
            found.append(Detected(corners.cpu().numpy(), (labels + 1).cpu().numpy(), best.cpu().numpy()))
        return found


def best_pairs(scores: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` highest of scores [q, K]: the scores, their queries and their classes from 0; a query may return."""
    best, order = scores.flatten().sort(descending=True, stable=True)
    best, order = best[:count], order[:count]
    return best, order // scores.shape[1], order % scores.shape[1]
