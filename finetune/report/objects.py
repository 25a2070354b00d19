"""Boxes and masks drawn on their image, and which of them are correct.

A prediction is right if its overlap with a true object of its class, not matched by a better prediction, is at least
MATCH_IOU: the rule of AP50, for display. Masks are compared if both sides have them, boxes otherwise; predictions that
overlap a crowd are neither right nor false.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageDraw

from finetune.data.coco import rle
from finetune.report import canvas
from finetune.report.canvas import CONFUSED, FALSE, MISSED, RIGHT
from pretrain.core.page.colours import RGB, colour

if TYPE_CHECKING:
    from finetune.data.coco.instances import Instances
    from finetune.predictions import Detected

MATCH_IOU = 0.5
NAMED = 40  # names of more objects than this would hide them
Verdict = Literal["right", "confused", "false", "crowd"]
_COLOURS: dict[Verdict, RGB] = {"right": RIGHT, "confused": CONFUSED, "false": FALSE, "crowd": canvas.PALE}


@dataclass(frozen=True)
class Judged:
    """A verdict per prediction; per true object whether it was found, and whether it was missed.

    Of true objects that are no crowd: found + assigned to another class ("confused") + missed = all.
    """

    verdicts: list[Verdict]
    found: np.ndarray
    missed: np.ndarray

    def count(self, verdict: Verdict) -> int:
        return self.verdicts.count(verdict)


def judge(truth: Instances, prediction: Detected) -> Judged:
    """Match predictions to true objects one to one, the highest score first, those of another class last."""
    overlaps = _overlaps(truth, prediction)
    crowd = np.asarray(truth.crowd, bool)
    same = truth.same_class(np.asarray(prediction.labels))
    free, found = ~crowd, np.zeros(len(crowd), bool)
    verdicts: list[Verdict] = ["false"] * len(same)
    order = np.argsort(-np.asarray(prediction.scores), kind="stable")
    for i in order:
        fits = np.flatnonzero(free & same[i] & (overlaps[i] >= MATCH_IOU))
        if len(fits):
            best = fits[overlaps[i, fits].argmax()]
            free[best], found[best], verdicts[i] = False, True, "right"
        elif (crowd & same[i] & (overlaps[i] >= MATCH_IOU)).any():
            verdicts[i] = "crowd"
    for i in (i for i in order if verdicts[i] == "false"):
        fits = np.flatnonzero(free & ~same[i] & (overlaps[i] >= MATCH_IOU))
        if len(fits):
            free[fits[overlaps[i, fits].argmax()]], verdicts[i] = False, "confused"
    return Judged(verdicts, found, missed=free)


def detection_picture(
    image: np.ndarray,
    truth: Instances | None,
    prediction: Detected | None,
    classes: Sequence[str],
    *,
    score_threshold: float = 0.5,
    caption: str = "",
) -> np.ndarray:
    """The image, its true objects, and the predicted ones coloured by their verdict: uint8 [h, w, 3].

    Args:
        image: uint8 [H, W, 3]; boxes and masks are in its pixels.
        classes: classes[0] is the name of label 1.
        score_threshold: predictions below it are neither drawn nor counted.
    """
    scale = canvas.view_scale(*image.shape[:2])
    shown = None if prediction is None else _at_least(prediction, score_threshold)
    image, brighter = canvas.brightened(image)
    parts = [(f"image{brighter}", canvas.resized(image, scale))]
    legend: list[tuple[RGB, str]] = []
    if truth is not None:
        crowds = np.asarray(truth.crowd, bool)
        names = [
            (classes[int(label) - 1] if label and len(classes) > 1 else "") + (" crowd" if crowd else "")
            for label, crowd in zip(truth.labels, crowds, strict=True)
        ]
        tints = _tints(truth.labels, classes)
        panel = draw_objects(image, truth.boxes, truth.masks, tints, names, scale=scale, classes=classes)
        parts.append((f"truth: {_counted(len(names))}", panel))
    if shown is not None and truth is None:
        tints = _tints(shown.labels, classes)
        panel = draw_objects(
            image, shown.boxes, shown.masks, tints, _names(shown, classes), scale=scale, classes=classes
        )
        parts.append((f"prediction: {_counted(len(shown.labels))}", panel))
    if shown is not None and truth is not None:
        judged = judge(truth, shown)
        panel, legend = _judged_panel(image, truth, shown, judged, classes, scale)
        parts.append((f"prediction: {judged.found.sum()} of {(~np.asarray(truth.crowd, bool)).sum()} found", panel))
    if shown is not None and prediction is not None and len(prediction.labels) > len(shown.labels):
        hidden = len(prediction.labels) - len(shown.labels)
        highest = float(np.asarray(prediction.scores).max())
        at_most = "" if len(shown.labels) else f", the highest {highest:.2f}"
        caption = f"{caption}   {hidden} predictions below {score_threshold:g} are not drawn{at_most}".strip()
    return canvas.panels(parts, legend=legend, caption=caption)


def draw_objects(
    image: np.ndarray,
    boxes: np.ndarray,
    masks: Sequence[rle.Rle] | None,
    tints: Sequence[RGB],
    names: Sequence[str],
    *,
    scale: float,
    classes: Sequence[str] = (),
) -> np.ndarray:
    """Masks filled lightly with a firm outline (without masks: boxes), names at their upper left corners.

    Many objects of a single class are drawn without names.
    """
    view = canvas.resized(image, scale)
    for mask, tint in zip(masks or (), tints, strict=False):
        where = canvas.resized_map(rle.coco.decode(mask).astype(bool), scale)
        canvas.blend(view, where, tint, alpha=0.35)
        canvas.blend(view, canvas.outline(where, width=2 if max(view.shape) > 400 else 1), tint, alpha=1.0)
    sheet = Image.fromarray(view)
    draw = ImageDraw.Draw(sheet)
    for box, tint in zip(boxes, tints, strict=True):
        if masks is None:
            draw.rectangle(_corners(box, scale, view.shape), outline=tint, width=2)
    few = len(names) <= (NAMED if len(classes) > 1 else NAMED // 4)
    for box, tint, name in zip(boxes, tints, names, strict=True):
        if few and name:
            x1, y1, _, _ = _corners(box, scale, view.shape)
            canvas.write_on(draw, (x1, y1), name, tint, size=11 if len(names) > 10 else 12)
    return np.array(sheet)


def _judged_panel(
    image: np.ndarray, truth: Instances, shown: Detected, judged: Judged, classes: Sequence[str], scale: float
) -> tuple[np.ndarray, list[tuple[RGB, str]]]:
    tints = [_COLOURS[verdict] for verdict in judged.verdicts]
    panel = draw_objects(image, shown.boxes, shown.masks, tints, _names(shown, classes), scale=scale, classes=classes)
    sheet = Image.fromarray(panel)
    draw = ImageDraw.Draw(sheet)
    for i in np.flatnonzero(judged.missed):
        _dashed(draw, _corners(truth.boxes[i], scale, panel.shape), MISSED)
    rows: list[tuple[Verdict, str]] = [("right", "right"), ("false", "false")]
    if len(classes) > 1:
        rows.insert(1, ("confused", "wrong class"))
    if "crowd" in judged.verdicts:
        rows.append(("crowd", "on a crowd, not counted"))
    legend = [(_COLOURS[verdict], f"{judged.count(verdict)} {text}") for verdict, text in rows]
    legend.append((MISSED, f"{judged.missed.sum()} missed (dashed)"))
    return np.array(sheet), legend


def _overlaps(truth: Instances, prediction: Detected) -> np.ndarray:
    """IoU [predictions, true objects]; with a crowd the share of the prediction inside it."""
    if not len(truth.labels) or not len(prediction.labels):
        return np.zeros((len(prediction.labels), len(truth.labels)))
    crowd = [int(flag) for flag in truth.crowd]
    if truth.masks is not None and prediction.masks is not None:
        return np.asarray(rle.coco.iou(list(prediction.masks), list(truth.masks), crowd))
    return np.asarray(rle.coco.iou(_xywh(prediction.boxes), _xywh(truth.boxes), crowd))


def _xywh(boxes: np.ndarray) -> np.ndarray:
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _at_least(prediction: Detected, threshold: float) -> Detected:
    """The predictions of at least this score, the best last, so that it is drawn on top."""
    order = np.argsort(np.asarray(prediction.scores), kind="stable")
    order = order[np.asarray(prediction.scores)[order] >= threshold]
    masks = None if prediction.masks is None else [prediction.masks[i] for i in order]
    boxes, labels, scores = (np.asarray(x)[order] for x in (prediction.boxes, prediction.labels, prediction.scores))
    return replace(prediction, boxes=boxes, labels=labels, scores=scores, masks=masks)


def _tints(labels: np.ndarray, classes: Sequence[str]) -> list[RGB]:
    """A colour per class; with a single class, per object."""
    return [colour(i if len(classes) == 1 else int(label) - 1) for i, label in enumerate(labels)]


def _names(shown: Detected, classes: Sequence[str]) -> list[str]:
    pairs = zip(shown.labels, shown.scores, strict=True)
    return [f"{classes[label - 1]} {score:.2f}" if len(classes) > 1 else f"{score:.2f}" for label, score in pairs]


def _corners(box: np.ndarray, scale: float, shape: tuple[int, ...]) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (float(value) * scale for value in box)
    x1, x2 = sorted((min(max(x1, 0), shape[1] - 1), min(max(x2, 0), shape[1] - 1)))
    y1, y2 = sorted((min(max(y1, 0), shape[0] - 1), min(max(y2, 0), shape[0] - 1)))
    return x1, y1, x2, y2


def _dashed(draw: ImageDraw.ImageDraw, corners: tuple[float, float, float, float], tint: RGB, *, dash: int = 6) -> None:
    """A dashed rectangle over a dark one, visible on any background."""
    x1, y1, x2, y2 = corners
    draw.rectangle(corners, outline=(0, 0, 0), width=2)
    for x in np.arange(x1, x2, 2 * dash):
        for y in (y1, y2):
            draw.line((x, y, min(x + dash, x2), y), fill=tint, width=2)
    for y in np.arange(y1, y2, 2 * dash):
        for x in (x1, x2):
            draw.line((x, y, x, min(y + dash, y2)), fill=tint, width=2)


def _counted(number: int) -> str:
    return f"{number} object{'s' if number != 1 else ''}"
