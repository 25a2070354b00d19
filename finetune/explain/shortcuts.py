"""Shortcuts of a classifier: a small place that decides for a class in all its images, such as a tag or a date stamp.

For each class the window is sought that holds most relevance in its images beyond what it holds in others. What is
said of it is measured on other images: the relevance on it, the fall of the score when it is replaced by that of an
image of another class, and, as the proof, how many images of other classes become this class when it is pasted into
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.data.examples import BadExample
from finetune.explain.data import ImageSet
from finetune.explain.maps import METHODS, lacking
from finetune.explain.subjects import Aim, ClassifierSubject

SIDE = 1 / 8  # of a window, in parts of the image's sides
FEWEST = 4  # images of a class, half to seek the window, half to measure it
DECIDES = 0.5  # share of other images that become the class, from which on a window is a shortcut
STANDS_OUT = 2.0  # relevance on the window, in multiples of its area
MOST = {"relevance": 256, "occlusion": 48}  # images to look at


@dataclass(frozen=True)
class Place:
    """The window of a class.

    rows, columns: in pixels of the canvas, first and behind the last. images: it was measured on. relevance: share of
    it in the window; elsewhere: the same in images of other classes. area: of the window, in parts of the image.
    fall: of the score when it is that of another class. becomes: share of other images that become the class when it is
    pasted.
    """

    name: str
    rows: tuple[int, int]
    columns: tuple[int, int]
    images: int
    relevance: float
    elsewhere: float
    area: float
    fall: float
    becomes: float

    @property
    def is_shortcut(self) -> bool:
        return self.becomes >= DECIDES and self.relevance >= STANDS_OUT * self.area

    @property
    def line(self) -> str:
        where = f"rows {self.rows[0]} to {self.rows[1]}, columns {self.columns[0]} to {self.columns[1]}"
        verdict = "a shortcut" if self.is_shortcut else "no shortcut"
        return (
            f"{self.name}: {verdict}: {where} ({self.area:.0%} of the image) "
            f"hold {self.relevance:.0%} of the relevance; pasted there, {self.becomes:.0%} of other images become "
            f"{self.name}"
        )


@dataclass(frozen=True)
class Places:
    """Of every class with enough images, the most decisive first; method: of the maps; images: looked at."""

    found: list[Place]
    method: str
    images: int


def seek(
    subject: ClassifierSubject,
    images: ImageSet,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 8,
    say: Callable[[str], None] = lambda _: None,
) -> Places:
    """The window of each class that the classifier names at least `FEWEST` times."""
    method = "relevance" if lacking(subject, "relevance") is None else "occlusion"
    pixels, maps, aims = _maps(subject, images, method, device, batch_size)
    labels = np.array([aim.label for aim in aims])
    found = []
    for label in np.unique(labels):
        own, others = np.flatnonzero(labels == label), np.flatnonzero(labels != label)
        if len(own) >= FEWEST and len(others):
            found.append(_place(subject, pixels, maps, aims, own, others, batch_size))
    say(f"shortcuts sought in {len(labels)} images, {len(found)} classes")
    return Places(sorted(found, key=lambda place: (-place.becomes, -place.relevance)), method, len(labels))


def _maps(
    subject: ClassifierSubject, images: ImageSet, method: str, device: torch.device | str, batch_size: int
) -> tuple[Tensor, Tensor, list[Aim]]:
    """Images [n, C, h, w], their maps [n, rows, columns] that sum to 1, and what is explained of each."""
    count = min(len(images), MOST[method])
    places = np.linspace(0, len(images) - 1, count).round().astype(int).tolist()
    pixels, maps, aims = [], [], []
    for start in range(0, count, batch_size):
        some = []
        for number in places[start : start + batch_size]:
            try:
                some.append(subject.prepare(images[number]))
            except BadExample:  # named where the images are explained
                continue
        if not some:
            continue
        batch = torch.stack(some).to(device)
        found = [aim for aim in subject.aims(batch) if aim is not None]
        values = METHODS[method].compute(subject, batch, found, None).clamp(min=0)
        maps.append((values / values.sum((1, 2), keepdim=True).clamp(min=1e-12)).cpu())
        pixels.append(batch)
        aims += found
    return torch.cat(pixels), torch.cat(maps), aims


def _place(
    subject: ClassifierSubject,
    pixels: Tensor,
    maps: Tensor,
    aims: Sequence[Aim],
    own: np.ndarray,
    others: np.ndarray,
    batch_size: int,
) -> Place:
    cells, (height, width) = subject.cells, subject.size
    side = (max(1, round(cells[0] * SIDE)), max(1, round(cells[1] * SIDE)))
    sums = F.avg_pool2d(maps[:, None], side, stride=1)[:, 0] * (side[0] * side[1])
    ahead = sums[own[::2]].mean(0) - sums[others].mean(0)  # every second image to seek it
    row, column = divmod(int(ahead.argmax()), ahead.shape[1])
    top, bottom = round(row * height / cells[0]), round((row + side[0]) * height / cells[0])
    left, right = round(column * width / cells[1]), round((column + side[1]) * width / cells[1])
    kept = own[1::2]  # and the others to measure it
    window = (slice(None), slice(None), slice(top, bottom), slice(left, right))
    falls, becomes = [], []
    with torch.no_grad():
        for start in range(0, len(kept), batch_size):
            some = kept[start : start + batch_size]
            hidden = pixels[some].clone()
            hidden[window] = pixels[others[np.arange(start, start + len(some)) % len(others)]][window]
            chosen = [aims[i] for i in some]
            falls += (subject.scores(pixels[some], chosen) - subject.scores(hidden, chosen)).tolist()
        for start in range(0, len(others), batch_size):
            some = others[start : start + batch_size]
            changed = pixels[some].clone()
            changed[window] = pixels[kept[np.arange(start, start + len(some)) % len(kept)]][window]
            becomes += [aim is not None and aim.label == aims[kept[0]].label for aim in subject.aims(changed)]
    label = aims[kept[0]].label
    assert label is not None
    return Place(
        subject.classes[label],
        (top, bottom),
        (left, right),
        len(kept),
        float(sums[kept, row, column].mean()),
        float(sums[others, row, column].mean()),
        (bottom - top) * (right - left) / (height * width),
        float(np.mean(falls)),
        float(np.mean(becomes)),
    )
