"""Objects of an image from those of its tiles: one for each object, also where it lies in several tiles.

Two detections of a class in two tiles are one object if, in the area that both tiles see, they are the same: an IoU of
at least SAME there. The best detection that no inner border of its tile cuts stands for the object; if all are cut, the
object is larger than the overlap, and the box around them and the union of their masks do. The score is the highest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from finetune.data.coco import rle
from finetune.predictions import Detected
from finetune.tiling.tiles import Tile

SAME = 0.5  # as the usual threshold of a detection that is correct
_AT_BORDER = 0.01  # of a tile's side: a box that ends so near to an inner border is cut


def merge_objects(size: tuple[int, int], tiles: Sequence[Tile], found: Sequence[Detected]) -> Detected:
    """The objects of an image of `size`, (height, width), best first, from those of its tiles."""
    of = np.repeat(np.arange(len(tiles)), [len(part.scores) for part in found])
    corners = np.array([[tile.left, tile.top] * 2 for tile in tiles], np.float32)
    boxes = np.concatenate([part.boxes for part in found]).reshape(-1, 4) + corners[of]
    labels = np.concatenate([part.labels for part in found])
    scores = np.concatenate([part.scores for part in found])
    with_masks = found[0].masks is not None
    masks = [
        rle.placed(mask, (tile.top, tile.left), size)
        for tile, part in zip(tiles, found, strict=True)
        for mask in part.masks or ()
    ]
    cut = _are_cut(boxes, np.array([tile.box for tile in tiles])[of], size)
    groups = sorted(_groups(tiles, of, boxes, labels), key=lambda group: (-scores[group].max(), group[0]))
    kept: list[int] = []
    for group in groups:
        whole = [member for member in group if not cut[member]]
        kept.append(max(whole or group, key=lambda member: float(scores[member])))
        if not whole:
            low, high = boxes[group][:, :2].min(0), boxes[group][:, 2:].max(0)
            boxes[kept[-1]] = np.concatenate([low, high])
            if with_masks and len(group) > 1:
                masks[kept[-1]] = rle.union([masks[member] for member in group])
        scores[kept[-1]] = scores[group].max()
    return Detected(boxes[kept], labels[kept], scores[kept], [masks[member] for member in kept] if with_masks else None)


def _groups(tiles: Sequence[Tile], of: np.ndarray, boxes: np.ndarray, labels: np.ndarray) -> list[list[int]]:
    """Detections that are one object: the most alike first, at most one of each tile."""
    pairs: list[tuple[float, int, int]] = []
    windows = np.array([tile.box for tile in tiles])
    for a, b in np.argwhere(np.triu(_iou(windows, windows) > 0, k=1)).tolist():
        common = _clipped(windows[a], windows[b])
        here, there = np.flatnonzero(of == a), np.flatnonzero(of == b)
        alike = _iou(_clipped(boxes[here], common), _clipped(boxes[there], common))
        alike[labels[here][:, None] != labels[there]] = 0
        pairs += [(float(alike[i, j]), int(here[i]), int(there[j])) for i, j in np.argwhere(alike >= SAME)]
    group = {member: [member] for member in range(len(of))}
    for _, i, j in sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2])):
        if not {of[member] for member in group[i]} & {of[member] for member in group[j]}:
            joined = sorted(group[i] + group[j])
            group |= dict.fromkeys(joined, joined)
    return [members for member, members in group.items() if member == members[0]]


def _are_cut(boxes: np.ndarray, tiles: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Whether a border of its tile that is none of the image cuts a box; boxes and tiles [n, 4]."""
    margin = _AT_BORDER * (tiles[:, 2:] - tiles[:, :2])
    before = (boxes[:, :2] <= tiles[:, :2] + margin) & (tiles[:, :2] > 0)
    after = (boxes[:, 2:] >= tiles[:, 2:] - margin) & (tiles[:, 2:] < np.array([size[1], size[0]]))
    return np.any(before | after, axis=1)


def _clipped(boxes: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Boxes [..., 4] within a window [4]; of no area where they are outside."""
    low = np.maximum(boxes[..., :2], window[:2])
    return np.concatenate([low, np.maximum(np.minimum(boxes[..., 2:], window[2:]), low)], axis=-1)


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of boxes [n, 4] and [m, 4]: [n, m]; 0 where one has no area."""
    sides = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    both = sides.clip(0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (a, b)]
    return both / np.maximum(areas[0][:, None] + areas[1] - both, 1e-9)
