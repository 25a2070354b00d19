"""Images that show the same picture: re-encoded, resized, cropped, mirrored or with other brightness and contrast.

Each image is a thumbnail of 64 x 64 values of brightness. A crop of one is looked for in the other: first 46 crops and
their mirror images at 16 x 16 against all whole images, then the best of them, with its edges moved until they fit, at
32 x 32. Correlations are of values with mean 0, so brightness and contrast do not matter. Time grows with the square of
the number of images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

THUMB, _COARSE, _FINE = 64, 16, 32
_SIDES = (64, 60, 56, 52, 48, 44)  # of the crops, in pixels of the thumbnail: areas of 1 to 0.47
_COARSE_LEAST, _PER_IMAGE = 0.7, 6  # correlation of a candidate, and number of candidates of an image
_MOVES = (3.0, 1.5, 0.75)  # of an edge, in pixels of the thumbnail
_CHUNK = 256
_FLAT = 2.0  # an image whose brightness deviates less than this, of 255, looks like every other such image


@dataclass(frozen=True)
class Near:
    """Image `a` shows a part or all of image `b`, or the reverse; numbers of thumbnails. likeness: 0 to 1."""

    a: int
    b: int
    likeness: float


def thumbnail(image: np.ndarray) -> np.ndarray:
    """uint8 or float32 [H, W, C], values of 0 to 255, to uint8 [64, 64]: brightness, without regard to the sides."""
    gray = torch.tensor(np.ascontiguousarray(image), dtype=torch.float32).mean(-1)[None, None]
    small = F.interpolate(gray, size=(THUMB, THUMB), mode="bilinear", antialias=True)[0, 0]
    return small.round().clamp(0, 255).to(torch.uint8).numpy()


def near_pairs(thumbnails: np.ndarray, others: np.ndarray | None, least: float) -> Iterator[Near]:
    """Pairs whose likeness is at least `least`: within [n, 64, 64], or of them (a) with [m, 64, 64] `others` (b)."""
    first = torch.from_numpy(thumbnails).float()
    second = first if others is None else torch.from_numpy(others).float()
    found: dict[tuple[int, int], tuple[Tensor, bool]] = {}
    for swapped, (cropped, whole) in enumerate(((first, second), (second, first))):
        if swapped and others is None:
            break  # both directions are in one product
        for one, other, window in _candidates(cropped, whole, itself=others is None):
            pair = (other, one) if swapped else (one, other)
            found.setdefault(pair, (window, bool(swapped)))
    seen: set[tuple[int, int]] = set()
    for (a, b), (window, swapped) in found.items():
        key = (min(a, b), max(a, b)) if others is None else (a, b)
        if key in seen:
            continue
        cropped, whole = (second[b], first[a]) if swapped else (first[a], second[b])
        likeness = _fitted(cropped, whole, window)
        if likeness >= least:
            seen.add(key)
            yield Near(*key, likeness)


def _candidates(cropped: Tensor, whole: Tensor, *, itself: bool) -> Iterator[tuple[int, int, Tensor]]:
    """(image of `cropped`, image of `whole`, window) where a window of the one resembles the other as a whole."""
    bank = _described(_resampled(whole, _window(0, 0, THUMB, mirrored=False)[None].expand(len(whole), -1), _COARSE))
    windows = torch.stack(list(_windows()))
    for start in range(0, len(cropped), _CHUNK):
        part = cropped[start : start + _CHUNK]
        best = torch.full((len(part), len(whole)), -1.0)
        which = torch.zeros((len(part), len(whole)), dtype=torch.int64)
        for number, window in enumerate(windows):
            likeness = _described(_resampled(part, window[None].expand(len(part), -1), _COARSE)) @ bank.T
            better = likeness > best
            best, which = torch.where(better, likeness, best), torch.where(better, number, which)
        if itself:
            own = torch.arange(len(part))
            best[own, own + start] = -1
        values, indices = best.topk(min(_PER_IMAGE, len(whole)), dim=1)
        for row, column in (values >= _COARSE_LEAST).nonzero().tolist():
            other = int(indices[row, column])
            yield start + row, other, windows[which[row, other]]


def _fitted(cropped: Tensor, whole: Tensor, window: Tensor) -> float:
    """The likeness of the best window near `window`: the smaller of the correlations of values and of their changes."""
    target = _resampled(whole[None], _window(0, 0, THUMB, mirrored=False)[None], _FINE)
    best, window = -1.0, window.clone()
    for move in _MOVES:
        for _ in range(4):
            shifts = torch.cat([torch.eye(4), -torch.eye(4), torch.zeros(1, 4)]) * move
            tried = window[None] + shifts
            likeness = _likeness(_resampled(cropped[None].expand(len(tried), -1, -1), tried, _FINE), target)
            chosen = int(likeness.argmax())
            if float(likeness[chosen]) <= best:
                break
            best, window = float(likeness[chosen]), tried[chosen]
    return best


def _likeness(images: Tensor, target: Tensor) -> Tensor:
    """[n, s, s] and [1, s, s] to [n]."""

    def changes(values: Tensor) -> Tensor:
        return torch.cat([values.diff(dim=1).flatten(1), values.diff(dim=2).flatten(1)], 1)

    values = (_described(images) * _described(target)).sum(1)
    edges = (F.normalize(changes(images), dim=1) * F.normalize(changes(target), dim=1)).sum(1)
    return torch.minimum(values, edges)


def _windows() -> Iterator[Tensor]:
    for side in _SIDES:
        starts = (0.0, (THUMB - side) / 2, float(THUMB - side)) if side < THUMB else (0.0,)
        for top in starts:
            for left in starts:
                for mirrored in (False, True):
                    yield _window(top, left, side, mirrored=mirrored)


def _window(top: float, left: float, side: float, *, mirrored: bool) -> Tensor:
    """(top, left, bottom, right) in pixels of the thumbnail; mirrored: left and right change places."""
    ends = (left + side, left) if mirrored else (left, left + side)
    return torch.tensor([top, ends[0], top + side, ends[1]])


def _resampled(images: Tensor, windows: Tensor, side: int) -> Tensor:
    """The windows [n, 4] of images [n, 64, 64] as [n, side, side], each value a mean of 4 points."""
    count = 2 * side
    at = (torch.arange(count) + 0.5) / count
    top, left, bottom, right = windows[:, :, None].unbind(1)
    rows, columns = top + (bottom - top) * at, left + (right - left) * at
    grid = (
        torch.stack([columns[:, None, :].expand(-1, count, -1), rows[:, :, None].expand(-1, -1, count)], -1)
        / (THUMB / 2)
        - 1
    )
    sampled = F.grid_sample(images[:, None], grid, mode="bilinear", padding_mode="border", align_corners=False)
    return F.avg_pool2d(sampled, 2)[:, 0]


def _described(images: Tensor) -> Tensor:
    """[n, s, s] to [n, s * s] of mean 0 and length 1; 0 for an image without contrast."""
    flat = images.flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    return torch.where(flat.std(1, keepdim=True) < _FLAT, 0.0, F.normalize(flat, dim=1))
