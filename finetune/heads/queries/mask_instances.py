"""From masks and classes of queries to the instances of an image, as Mask2Former does it (Cheng et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from finetune.data.coco import rle
from finetune.heads.pixels.dense_parts import resize
from finetune.heads.queries.detr import best_pairs
from finetune.predictions import Detected

PIXELS_AT_ONCE = 2**26  # of masks at the size of the image: a hundred masks of a large photo need tens of gigabytes


def instances(
    masks: Tensor,
    classes: Tensor,
    *,
    canvas: tuple[int, int],
    contents: Sequence[tuple[int, int]],
    sizes: Sequence[tuple[int, int]],
    max_detections: int = 100,
) -> list[Detected]:
    """Mask logits [b, q, h, w] and class logits [b, q, K + 1] -> the instances of each image, in its original pixels.

    A score is the class probability times the mean probability inside the mask; a query may give several classes. Masks
    without a pixel are left out. Boxes are those of the masks.

    Args:
        canvas: (height, width) of the images that the logits belong to. contents: of the part of each, at its top left,
            that is not padding. sizes: of the original images.
    """
    found = []
    for i, (content, size) in enumerate(zip(contents, sizes, strict=True)):
        best, queries, labels = best_pairs(classes[i].float().softmax(-1)[:, :-1], max_detections)
        used, places = queries.unique(return_inverse=True)
        counts, certainties, encoded = [], [], []
        at_once = max(1, PIXELS_AT_ONCE // max(size[0] * size[1], canvas[0] * canvas[1]))
        for some in used.split(at_once):
            logits = resize(masks[i : i + 1, some].float(), canvas)[:, :, : content[0], : content[1]]
            logits = resize(logits, size)[0]
            inside = logits > 0
            counts.append(inside.flatten(1).sum(1))
            certainties.append((logits.sigmoid() * inside).flatten(1).sum(1) / counts[-1].clamp(min=1))
            encoded += rle.encode(inside.cpu().numpy())
        pixels, certainty = torch.cat(counts), torch.cat(certainties)
        scores = best * certainty[places]
        order = scores.sort(descending=True, stable=True).indices
        order = order[pixels[places[order]] > 0]
        chosen = [encoded[place] for place in places[order].tolist()]
        boxes = rle.boxes(chosen) if chosen else np.zeros((0, 4), dtype=np.float32)
        found.append(Detected(boxes, (labels[order] + 1).cpu().numpy(), scores[order].cpu().numpy(), chosen))
    return found
