"""Numbers about maps: deletion and insertion, the pointing game, the mass in a region, each with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.explain.maps import to_cells
from finetune.explain.subjects import Aim, Subject
from finetune.metrics.faithfulness import Model, area, deletion, insertion
from pretrain.data.sampling import keyed

STEPS = 50  # of deletion and insertion, about: N / 50 patches at once
QUICK_STEPS = 10  # in the report of a run
RESAMPLES = 1000
_PURPOSE = keyed.noise_purpose("bootstrap of fovea explain")


@dataclass(frozen=True)
class Mean:
    """A mean over images and its 95 % interval over bootstrap resamples of them; nan: of none.

    count: of the images that have the number.
    """

    value: float
    low: float
    high: float
    count: int


def mean_of(values: Sequence[float], *, seed: int) -> Mean:
    """The mean of the finite `values`, with the percentile interval over resamples drawn from `seed`."""
    found = np.array([value for value in values if np.isfinite(value)])
    if not len(found):
        return Mean(np.nan, np.nan, np.nan, 0)
    drawn = keyed.uniforms(seed, len(found), _PURPOSE, count=RESAMPLES * len(found)).reshape(RESAMPLES, -1)
    low, high = np.percentile(found[(drawn * len(found)).astype(int)].mean(1), [2.5, 97.5])
    return Mean(float(found.mean()), float(low), float(high), len(found))


def faithfulness(
    subject: Subject, images: Tensor, aims: Sequence[Aim], maps: Mapping[str, Tensor], *, steps: int = STEPS
) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each of `maps` [b, *cells], by name: areas [b] under the deletion curve (low is good) and the insertion curve
    (high is good).

    Whole cells are replaced by the blurred image, N / `steps` of N at once, so that equal numbers of patches compare.
    """
    rows, columns = subject.cells
    count, (height, width) = rows * columns, subject.size
    step = max(1, round(count / steps)) * (height * width // count)
    blurred = subject.substrate(images)
    model = _remembering(subject.follow(aims), images, blurred)
    found = {}
    for name, values in maps.items():
        ranks = values.flatten(1).argsort(dim=1, stable=True).argsort(dim=1).float().unflatten(1, (rows, columns))
        pixels = F.interpolate(ranks[:, None], size=(height, width), mode="nearest")[:, 0].to(images.device)
        curves = [curve(model, images, pixels, blurred, step=step) for curve in (deletion, insertion)]
        found[name] = area(curves[0]).cpu(), area(curves[1]).cpu()
    return found


@torch.no_grad()
def _remembering(model: Model, *images: Tensor) -> Model:
    """The model, which computes the answers to `images`, the ends of all curves, only once."""
    known = [(one, model(one)) for one in images]

    def remembered(given: Tensor) -> Tensor:
        for one, answer in known:
            if torch.equal(one, given):
                return answer
        return model(given)

    return remembered


def pointing(maps: Tensor, regions: Sequence[np.ndarray | None]) -> list[float]:
    """1 where the most important cell lies on the region, 0 where it does not (Zhang et al. 2016); nan without one.

    Args:
        maps: [b, rows, columns]. regions: bool [h, w] of the canvas.
    """
    found = []
    for values, covered in zip(maps, _covered(maps, regions), strict=True):
        found.append(np.nan if covered is None else float(covered.flatten()[values.flatten().argmax()] > 0))
    return found


def mass(maps: Tensor, regions: Sequence[np.ndarray | None]) -> list[float]:
    """The share of the positive importance that lies in the region; nan without a region or without importance."""
    found = []
    for values, covered in zip(maps, _covered(maps, regions), strict=True):
        positive = values.clamp(min=0)
        total = float(positive.sum())
        found.append(np.nan if covered is None or total <= 0 else float((positive * covered).sum()) / total)
    return found


def shares(regions: Sequence[np.ndarray | None]) -> list[float]:
    """The share of the canvas that each region covers: the mass of a map that knows nothing."""
    return [np.nan if region is None or not region.any() else float(region.mean()) for region in regions]


def _covered(maps: Tensor, regions: Sequence[np.ndarray | None]) -> list[Tensor | None]:
    """How much of each cell lies in the region, [rows, columns]; None without one."""
    cells = (maps.shape[1], maps.shape[2])
    return [
        None if region is None or not region.any() else to_cells(torch.from_numpy(region)[None].float(), cells)[0]
        for region in regions
    ]
