"""A classifier for labelled images: what is trained and for how long, from the number of images of each class."""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from finetune.data.examples import BadExample, Examples
from launch.init.machine import Target
from launch.init.text import Choice
from launch.init.training import Backbone, Length, length
from pretrain.data.write.images import UnreadableImageError, image_sides

LOOKED_AT = 200  # files whose sides are read
FEW = 10  # images of a class in the median, below which the backbone stays frozen
UNEVEN = 10  # ratio of the largest to the smallest class from which it is said
MEAN_POOLED = ("mae", "simmim", "ijepa", "data2vec", "beit", "data2vec2")  # their class token, if any, is not trained


def choose(examples: Examples, backbone: Backbone, where: Target) -> tuple[list[Choice], Length, bool]:
    """The section `task`, the length of the run, and whether the backbone is frozen."""
    counts = np.bincount(np.asarray(getattr(examples, "labels")), minlength=len(examples.classes))  # noqa: B009
    middle, frozen = float(np.median(counts)), bool(np.median(counts) < FEW)
    shorter = _shorter_sides(examples)
    text = f"{len(examples)} images of {len(counts)} classes: {counts.min()} to {counts.max()} each, {middle:.0f} in "
    text += "the median"
    if counts.max() >= UNEVEN * max(counts.min(), 1):
        names = ", ".join(examples.classes[i] for i in np.argsort(counts)[:3])
        text += f" (rare: {names}; classes are not weighted, so read the accuracy of each)"
    why = f"{text}. Fewer than {FEW} of a class: only a classifier on frozen features is trained." if frozen else ""
    why = why or f"{text}: enough to train the whole network."
    choices = [Choice("task.name", "classification"), Choice("task.train", "linear" if frozen else "full", why)]
    if backbone.objective in MEAN_POOLED:
        choices.append(Choice("task.pool", "mean", f"{backbone.objective} trains patches, not a class token."))
    if not frozen:
        augment = {"scale": [0.3, 1.0], "rand_augment": 2, "magnitude": 5.0, "erase": 0.25, "smoothing": 0.1}
        reason = "As configs/finetune/grocery_small.yaml: crops keep most of the object."
        choices.append(Choice("task.augment", augment, reason))
    side = min(backbone.size)
    note = f"Images have shorter sides of {np.median(shorter):.0f} px in the median. The weights are of {side} px."
    choices.append(Choice("model.img_size", [*backbone.size], note))
    return choices, length(len(examples), 32, views=9600, epochs=15, gpu=where.gpu), frozen


def _shorter_sides(examples: Examples) -> np.ndarray:
    found: list[int] = []
    for place in np.linspace(0, len(examples) - 1, min(LOOKED_AT, len(examples))).astype(int).tolist():
        with suppress(BadExample, UnreadableImageError):  # a check names them
            found.append(min(image_sides(examples.file(place))))
    return np.array(found or [0])
