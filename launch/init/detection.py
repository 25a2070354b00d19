"""A detector for the objects of a data set: image size, levels, anchors and heads from the sizes of the boxes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.data.coco.box_sizes import FITS, BoxSizes, best_overlaps, percentiles_text, sides, spread
from launch.init.machine import Target
from launch.init.text import Choice
from launch.init.training import Backbone, Length, length, multiple

MOST_CPU, MOST_GPU = 320, 1024  # longest side in pixels; ViTDet's is 1024
SMALL_BOX, USUAL_BOX = 16, 32  # pixels that small boxes (`_small`) and the median of the sides should have
CELLS = 3  # of the finest level, that a small box should cover
FEWEST = 10  # boxes of a class that count
LEAST = 1.5  # cells of its level that an anchor covers at least: boxes between smaller ones would be missed
FINEST = 3.5  # pixels: levels below this stride cost more than they find
ENDS = ((5, 95), (10, 90), (15, 85))  # percentiles of the sides that anchors may span
ONE_SHAPE = 2.0  # ratio of the 85th to the 15th percentile of height / width, up to which one shape of anchor does
OBJECTS = 100  # detections of an image that COCO's AP counts


@dataclass(frozen=True)
class Levels:
    """Of the pyramid, with the one above it. scales: None of a hierarchical backbone, whose stages are the levels."""

    scales: list[float] | None
    strides: list[float]


def choose(found: BoxSizes, backbone: Backbone, where: Target, *, masks: bool) -> tuple[list[Choice], Length]:
    """The section `task`, and the length of the run.

    Args:
        found: boxes of the training images. masks: train masks too.
    """
    canvas, why_canvas = _canvas(found, backbone, where)
    boxes = found.fitted(canvas)
    ratios = _ratios(boxes)
    levels, anchors = _levels(boxes, found.labels, ratios, backbone)
    covered = float((best_overlaps(boxes, anchors, ratios) >= FITS).mean())
    counts = np.bincount(found.images, minlength=len(found.sizes))
    crop, scale, why_crop = _crops(boxes, canvas, backbone, where, len(found.sizes))
    why_anchors = (
        f"Sides of the boxes in pixels of the network: {percentiles_text(sides(boxes))}. An anchor for each level, in "
        f"equal steps from the smallest usual boxes to the largest: {covered:.0%} of all boxes overlap one by half "
        "(IoU) or more."
    )
    shapes = percentiles_text(boxes[:, 1] / boxes[:, 0])
    strides = ", ".join(f"{stride:g}" for stride in levels.strides)
    choices = [
        Choice("task.name", "detection"),
        Choice(
            "task.head.name",
            "mask_rcnn" if masks else "faster_rcnn",
            "Every object has a mask." if masks else "Boxes only: not every object has a mask.",
        ),
    ]
    if levels.scales is not None:
        why = f"Levels at strides of {strides} px, the last for proposals only: small boxes cover {CELLS} cells of the "
        why += f"first, unless that needs less than {FINEST:g} px or a quarter of a patch."
        choices.append(Choice("task.head.scales", levels.scales, why))
    choices += [
        Choice("task.head.anchors", anchors, why_anchors),
        Choice("task.head.ratios", ratios, f"Height / width of the boxes: {shapes}."),
        *_heads(backbone, where, float(np.percentile(counts, 95)), masks=masks),
    ]
    if backbone.plain and backbone.kind != "large":
        choices.append(Choice("task.final_norm", True, "Small backbones learn faster with their last norm."))
    if max(canvas) >= MOST_GPU and backbone.plain and backbone.depth % 4 == 0:
        blocks = [(i + 1) * backbone.depth // 4 - 1 for i in range(4)]
        choices.append(Choice("task.window", 14, "Attention in windows, as ViTDet: all patches at once are too many."))
        choices.append(Choice("task.global_blocks", blocks))
    choices += [
        Choice("task.size", crop, why_crop),
        Choice("task.test_size", [*canvas], why_canvas),
        Choice("task.scale", scale),
    ]
    most = int(counts.max())
    if most > OBJECTS:
        why = f"An image has up to {most} objects. AP with more than {OBJECTS} detections is not COCO's usual number."
        choices.append(Choice("task.max_detections", multiple(1.2 * most, 50), why))
    batch = 16 if where.gpu else 8
    return choices, length(len(found.sizes), batch, views=3200, epochs=12, gpu=where.gpu)


def _canvas(found: BoxSizes, backbone: Backbone, where: Target) -> tuple[tuple[int, int], str]:
    """(height, width) that images are fitted into for prediction, and why."""
    height, width = (float(side) for side in np.median(found.sizes, axis=0))
    s = sides(found.fitted((round(height), round(width))))
    small, usual = _small(s, found.labels), float(np.median(s))
    wanted = 1.0 if where.gpu else max(SMALL_BOX / small, USUAL_BOX / usual)
    most = MOST_GPU if where.gpu else MOST_CPU
    factor = min(1.0, wanted, most / max(height, width))
    unit = 2 * backbone.strides[0] if backbone.plain else backbone.strides[-1]
    wide = (found.sizes[:, 1] >= found.sizes[:, 0]).mean()
    if 0.1 < wide < 0.9:  # photos upright and across
        height = width = max(height, width)
    canvas = multiple(factor * height, unit), multiple(factor * width, unit)
    limit = "" if factor < most / max(height, width) or factor == 1 else f" (at most {most} px here)"
    why = (
        f"{len(found.sizes)} images, in the median {height:.0f} x {width:.0f} px with boxes of {usual:.0f} px; fitted "
        f"into this the median side is {usual * factor:.0f} px, small ones have {small * factor:.0f}{limit}. "
        "Larger finds more and takes longer."
    )
    return canvas, why


def _by_class(values: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """The values of each class with FEWEST boxes or more; all values if there is none."""
    return [values[labels == label] for label in np.unique(labels) if (labels == label).sum() >= FEWEST] or [values]


def _small(s: np.ndarray, labels: np.ndarray) -> float:
    """The 10th percentile of the sides, or the median of the smallest class: a rare class can be of small objects."""
    return min(float(np.percentile(s, 10)), *(float(np.median(of_class)) for of_class in _by_class(s, labels)))


def _levels(
    boxes: np.ndarray, labels: np.ndarray, ratios: list[float], backbone: Backbone
) -> tuple[Levels, list[float]]:
    """Levels, and an anchor for each: as many as the sizes need, of which one is twice the next."""
    if not backbone.plain:
        strides: list[float] = [*backbone.strides]
        levels = Levels(None, [*strides, strides[-1] * 2])
        return levels, _anchors(boxes, labels, ratios, [0.0] * len(levels.strides))
    patch, s = backbone.strides[0], sides(boxes)
    possible = [scale for scale in (4, 2, 1) if patch / scale >= FINEST] or [1]
    first = next((scale for scale in reversed(possible) if patch / scale <= _small(s, labels) / CELLS), possible[0])
    scales: list[float] = [scale for scale in (4, 2, 1, 0.5) if scale <= first]
    ends = _ends(s, labels)
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    for wanted in range(int(np.clip(np.ceil(np.log2(high / low)), 2, len(scales) + 1)), 2, -1):
        found = Levels(scales[: wanted - 1], [patch / first * 2**level for level in range(wanted)])
        if anchors := _anchors(boxes, labels, ratios, found.strides):
            return found, anchors
    return Levels(scales[:1], [patch / first, 2 * patch / first]), _anchors(boxes, labels, ratios, [0.0, 0.0])


def _ends(s: np.ndarray, labels: np.ndarray) -> list[tuple[float, float]]:
    """Ranges of sides that anchors may span: first that of the usual boxes of all classes, then those of ENDS."""
    classes = [np.percentile(of_class, (10, 90)) for of_class in _by_class(s, labels)]
    widest = min(low for low, _ in classes), max(high for _, high in classes)
    return [(float(low), float(high)) for low, high in (widest, *(np.percentile(s, ends) for ends in ENDS))]


def _anchors(boxes: np.ndarray, labels: np.ndarray, ratios: list[float], strides: list[float]) -> list[float]:
    """A side for each level, in the middle of equal steps of log size in that range which fits the most boxes, every
    class counting the same. None is smaller than LEAST cells of its level; [] if this is not possible."""
    found: list[tuple[float, list[float]]] = [(-1.0, [])]
    for low, high in _ends(sides(boxes), labels):
        anchors = spread(low, high, len(strides))
        fits = _by_class(best_overlaps(boxes, anchors, ratios) >= FITS, labels)
        if all(side >= LEAST * stride for side, stride in zip(anchors, strides, strict=True)):
            found.append((float(np.mean([of_class.mean() for of_class in fits])), anchors))
    return max(found)[1]


def _ratios(boxes: np.ndarray) -> list[float]:
    """Shapes of anchors, height / width: the median, with the 15th and 85th percentile where they differ much."""
    low, middle, high = np.percentile(boxes[:, 1] / boxes[:, 0], (15, 50, 85))
    chosen = [middle] if high / low <= ONE_SHAPE else [low, middle, high]
    return [round(float(ratio), 2) for ratio in chosen]


def _heads(backbone: Backbone, where: Target, objects: float, *, masks: bool) -> list[Choice]:
    """Widths, and numbers of proposals from the objects of an image (95th percentile)."""
    proposals = int(np.clip(multiple(3 * objects, 50), 100, 1000))
    why = f"95 % of the images have {objects:.0f} objects or fewer: three proposals for each."
    found = [
        Choice("task.head.proposals", [proposals, proposals], why),
        Choice("task.head.before_nms", [2 * proposals, 2 * proposals]),
    ]
    if backbone.kind == "large" or where.gpu:
        return found
    small: dict[str, Any] = {"channels": 64, "rpn_convs": 1, "rpn_batch": 64, "roi_batch": 48}
    small |= {"box_convs": 0, "box_dim": 256, **({"mask_convs": 2} if masks else {})}
    reason = "Narrow heads, which learn on CPU cores in minutes (configs/results/bccd_faster_rcnn.yaml)."
    return [*found, *(Choice(f"task.head.{key}", v, "" if i else reason) for i, (key, v) in enumerate(small.items()))]


def _crops(
    boxes: np.ndarray, canvas: tuple[int, int], backbone: Backbone, where: Target, images: int
) -> tuple[list[int], list[float], str]:
    """Training canvas, range of scales, why."""
    unit = 2 * backbone.strides[0] if backbone.plain else backbone.strides[-1]
    large = float(np.percentile(boxes.max(axis=1), 90))
    part = 1 / 2 if large <= min(canvas) / 4 else 2 / 3
    if not where.gpu and large <= min(canvas) / 3:
        size = [multiple(side * part, unit) for side in canvas]
        why = f"Training on crops, which is less work: 90 % of the objects are within {large:.0f} px. `scale` keeps "
        why += "their sizes around those of prediction."
    else:
        size, why = [*canvas], f"Training on complete images: objects reach {large:.0f} px."
    ratio = canvas[0] / size[0]
    low, high = (0.1, 2.0) if where.gpu and images >= 10_000 else (0.7, 1.3)
    return size, [round(low * ratio, 2), round(high * ratio, 2)], why
