"""When a network fails: its metric by brightness, blur, size, position, class and source, the worst first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch

from finetune.data.batches import move
from finetune.data.coco.instances import Instances
from finetune.data.examples import BadExample, Example
from finetune.explain.data import ImageSet, painted
from finetune.explain.measures import RESAMPLES, Mean
from finetune.explain.subjects import TaskSubject
from finetune.predictions import Classified, Detected
from finetune.report.objects import judge
from finetune.tasks.base import Task
from pretrain.data.sampling import keyed

FEWEST = 4  # items of a slice
THIRDS = ("lowest third", "middle third", "highest third")
SURE = 0.5  # score from which on a detection counts
_PURPOSE = keyed.noise_purpose("slices of fovea explain")

Trait = float | str


@dataclass(frozen=True)
class Item:
    """An image or an object: how well the network did on it, and its traits by name."""

    quality: float
    traits: dict[str, Trait]


@dataclass(frozen=True)
class Slice:
    """The items that share a trait.

    of: "image" or "object". trait, value: in words. mean: of their quality. rest: of all others. difference: of the
    two, with its interval over bootstrap resamples of both.
    """

    of: str
    trait: str
    value: str
    mean: float
    rest: float
    difference: Mean

    @property
    def is_worse(self) -> bool:
        """Its interval of the difference lies below 0."""
        return self.difference.high < 0


def measured(
    subject: TaskSubject,
    images: ImageSet,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 8,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[list[Slice], str]:
    """The slices of all labelled images, the worst first, and what was measured, in words."""
    task = subject.task
    of_images, of_objects = [], []
    for example, prediction, quality in _predictions(task, images, device, batch_size):
        if isinstance(prediction, Classified):
            quality = float(int(prediction.probabilities.argmax()) == example.target)
        if np.isfinite(quality):
            of_images.append(Item(quality, image_traits(example, task.classes)))
        if isinstance(prediction, Detected):
            of_objects += list(_objects(example, prediction, task.classes))
    found = sliced("image", of_images, seed=seed) + sliced("object", of_objects, seed=seed)
    say(f"{len(of_images)} images and {len(of_objects)} objects in {len(found)} slices")
    words = {"classification": "right answers", "detection": "panoptic quality of an image; share of objects found",
             "multi_label": "average precision of an image's labels"}  # fmt: skip
    return worst_first(found), words.get(task.config.name, "mean IoU of an image's classes")


def image_traits(example: Example, classes: Sequence[str]) -> dict[str, Trait]:
    """Brightness, sharpness, size, source and class of an image."""
    gray = example.image.astype(np.float32).mean(2)
    traits: dict[str, Trait] = {
        "brightness": float(gray.mean()),
        "sharpness": _sharpness(gray),
        "image size": float(gray.size),
        "source": str(PurePosixPath(str(example.name)).parent),
    }
    if isinstance(example.target, int | np.integer) and example.target >= 0:
        traits["class"] = classes[int(example.target)]
        traits["source"] = str(PurePosixPath(str(example.name)).parent.parent)  # folders are the classes themselves
    elif isinstance(example.target, Instances):
        truth = example.target.select(~example.target.crowd)
        traits["number of objects"] = float(len(truth))
        if len(truth):
            traits["object size"] = float(painted(truth, gray.shape).mean() / len(truth))
    elif isinstance(example.target, np.ndarray) and example.target.ndim == 2:
        counts = np.bincount(example.target.ravel().astype(np.int64), minlength=256)[: len(classes)]
        shares = {f"area of {name}": float(count) for name, count in zip(classes, counts, strict=True) if count}
        traits |= shares if len(shares) <= 2 else {}
    return traits


def sliced(of: str, items: Sequence[Item], *, seed: int) -> list[Slice]:
    """Each trait of numbers in thirds, of words by its values; slices of fewer than `FEWEST` items are left out."""
    found = []
    for trait in dict.fromkeys(name for item in items for name in item.traits):
        having = [item for item in items if trait in item.traits]
        values = [item.traits[trait] for item in having]
        quality = np.array([item.quality for item in having])
        for value, chosen in _groups(values):
            if FEWEST <= chosen.sum() <= len(having) - FEWEST:
                difference = _difference(quality[chosen], quality[~chosen], seed=seed)
                means = float(quality[chosen].mean()), float(quality[~chosen].mean())
                found.append(Slice(of, trait, value, *means, difference))
    return found


def worst_first(slices: Sequence[Slice]) -> list[Slice]:
    """Those that are worse beyond doubt first, then by their difference to the rest."""
    return sorted(slices, key=lambda one: (not one.is_worse, one.difference.value))


def _groups(values: Sequence[Trait]) -> Iterator[tuple[str, np.ndarray]]:
    """(words, bool [n]) of each slice."""
    if all(isinstance(value, str) for value in values):
        named = np.array(values)
        kinds = list(dict.fromkeys(values))
        yield from ((str(kind), named == kind) for kind in kinds if len(kinds) > 1)
        return
    numbers = np.array(values, dtype=np.float64)
    edges = np.quantile(numbers, [0, 1 / 3, 2 / 3, 1])
    if len(np.unique(edges)) < 4:
        return
    for third, (low, high) in enumerate(pairwise(edges.tolist())):
        inside = (numbers >= low) & ((numbers < high) if third < 2 else (numbers <= high))
        yield f"{THIRDS[third]} ({low:.3g} to {high:.3g})", inside


def _difference(chosen: np.ndarray, rest: np.ndarray, *, seed: int) -> Mean:
    """Of the means, with the interval over resamples to which the lowest and the highest quality are added once."""
    drawn = []
    ends = [min(chosen.min(), rest.min()), max(chosen.max(), rest.max())]
    for part, values in enumerate((chosen, rest)):
        values = np.append(values, ends)  # a few equal values say nothing of their spread (Agresti & Coull 1998)
        uniform = keyed.uniforms(seed, len(values), _PURPOSE, part, count=RESAMPLES * len(values))
        drawn.append(values[(uniform.reshape(RESAMPLES, -1) * len(values)).astype(int)].mean(1))
    low, high = np.percentile(drawn[0] - drawn[1], [2.5, 97.5])
    return Mean(float(chosen.mean() - rest.mean()), float(low), float(high), len(chosen))


def _predictions(task: Task, images: ImageSet, device: Any, batch_size: int) -> Iterator[tuple[Example, Any, float]]:
    """(example, prediction, its quality by the task's metric) of every image that can be decoded."""
    metric, transform = task.metric(images.examples), task.eval_transform()
    for start in range(0, len(images), batch_size):
        examples = []
        for number in range(start, min(start + batch_size, len(images))):
            try:
                examples.append((number, images[number]))
            except BadExample:  # named where the images are explained
                continue
        if not examples:
            continue
        with torch.no_grad():
            batch = task.collate([transform(example) for _, example in examples])
            found = task.predict(move(batch, device))
        for (number, example), prediction in zip(examples, found, strict=True):
            yield example, prediction, metric.update(number, example, prediction)


def _objects(example: Example, prediction: Detected, classes: Sequence[str]) -> Iterator[Item]:
    """The true objects of an image: 1 where one was found, 0 where not."""
    sure = prediction.scores >= SURE
    masks = None if prediction.masks is None else [m for m, s in zip(prediction.masks, sure, strict=True) if s]
    few = replace(prediction, boxes=prediction.boxes[sure], labels=prediction.labels[sure],
                  scores=prediction.scores[sure], masks=masks)  # fmt: skip
    truth: Instances = example.target
    found = judge(truth, few).found
    height, width = example.image.shape[:2]
    for place in np.flatnonzero(~truth.crowd):
        x1, y1, x2, y2 = truth.boxes[place].tolist()
        at_border = x1 < 1 or y1 < 1 or x2 > width - 1 or y2 > height - 1
        traits: dict[str, Trait] = {
            "object size": float(truth.areas[place]),
            "position": "at the border" if at_border else "inside",
        }
        if len(classes) > 1:
            traits["class"] = classes[int(truth.labels[place]) - 1]
        yield Item(float(found[place]), traits)


def _sharpness(gray: np.ndarray) -> float:
    """The standard deviation of the Laplacian relative to that of the pixels: low in a blurred image."""
    laplacian = (
        gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:] - 4 * gray[1:-1, 1:-1]
        if min(gray.shape) > 2
        else np.zeros((1, 1))
    )  # fmt: skip
    return float(laplacian.std() / max(gray.std(), 1e-6))
