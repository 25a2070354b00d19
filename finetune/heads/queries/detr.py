"""A set of boxes for each image: the decoder of queries on the last map of any backbone, with its loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from finetune.dense.contract import DenseBackbone
from finetune.heads.boxes.box_loss import BoxSetLoss, BoxTargets
from finetune.heads.queries.query_decoder import QueryDecoder
from finetune.predictions import Detected


class DETR(nn.Module):
    """The decoder and its loss; the backbone is an argument of every call.

    Attributes:
        noise: uniform random numbers per image that `losses` reads: none.
    """

    noise = 0

    def __init__(self, decoder: QueryDecoder, loss: BoxSetLoss):
        super().__init__()
        self.decoder, self.loss = decoder, loss

    def forward(
        self, dense: DenseBackbone, images: Tensor, *, drop: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Images [b, C, H, W] -> (boxes [b, q, 4] in parts of `dense.covered`, class logits) of each layer; the last is
        the result."""
        return self.decoder(dense(images, drop)[-1])

    def losses(
        self, dense: DenseBackbone, images: Tensor, targets: list[dict[str, Tensor]], *, drop: Tensor | None = None
    ) -> dict[str, Tensor]:
        """ "loss"; its terms "class", "l1" and "giou" in the last layer; "without_query", see `BoxSetLoss`.

        Args:
            targets: of each image, as torchvision's detectors take them: "labels" int64 [n] from 1 and "boxes" [n, 4]
                as x1, y1, x2, y2 in pixels; "ignored" [m, 4], if there: regions where a query without an object has
                no loss (see `boxes.ignored`).

        Raises:
            ValueError: a label is not one of the classes.
        """
        layers, size = self(dense, images, drop=drop), dense.covered(images)
        in_parts = [
            BoxTargets.of_pixels(each["labels"] - 1, each["boxes"], size, each.get("ignored")) for each in targets
        ]
        return self.loss(layers, in_parts)

    def detections(
        self,
        boxes: Tensor,
        logits: Tensor,
        *,
        covered: tuple[int, int],
        contents: Sequence[tuple[int, int]],
        sizes: Sequence[tuple[int, int]],
        max_detections: int = 100,
    ) -> list[Detected]:
        """The best `max_detections` of each image, from the last layer of `forward`, in the pixels of the original.

        Args:
            covered: (height, width) that the boxes are parts of, in pixels.
            contents: (height, width) of the part of each image, at its top left, that is not padding.
            sizes: (height, width) of the original images.
        """
        boxes, scores = boxes.float(), self.loss.scores(logits)
        found = []
        for i, ((high, wide), (height, width)) in enumerate(zip(contents, sizes, strict=True)):
            best, queries, labels = best_pairs(scores[i], max_detections)
            zoom = boxes.new_tensor([covered[1] * width / wide, covered[0] * height / high] * 2)
            limits = boxes.new_tensor([width, height] * 2)
            corners = torch.minimum((box_convert(boxes[i, queries], "cxcywh", "xyxy") * zoom).clamp(min=0), limits)
            found.append(Detected(corners.cpu().numpy(), (labels + 1).cpu().numpy(), best.cpu().numpy()))
        return found


def best_pairs(scores: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` highest of scores [q, K]: the scores, their queries and their classes from 0; a query may repeat."""
    best, order = scores.flatten().sort(descending=True, stable=True)
    best, order = best[:count], order[:count]
    return best, order // scores.shape[1], order % scores.shape[1]
