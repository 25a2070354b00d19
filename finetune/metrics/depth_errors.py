"""Metrics of depth (Eigen et al. 2014, section 4): the errors of each image, averaged over images."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from finetune.data.examples import Example
from finetune.metrics.metric import Scores, gather_rows
from finetune.predictions import DepthMap

EvalCrop = Literal["none", "eigen", "garg"]
NAMES = ("delta1", "delta2", "delta3", "abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog")
# rows and columns as fractions of the image: Eigen's of NYU (480 x 640), Garg et al. 2016's of KITTI
CROPS = {
    "eigen": (45 / 480, 471 / 480, 41 / 640, 601 / 640),
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
}


class DepthMetric:
    """Errors in metres where the ground truth is within the range.

    Args:
        min_depth, max_depth: metres; the prediction is clipped to them, truth outside is left out.
        crop: the evaluated part of the images.
        protocol: how the predictions were computed; the metric is appended.
    """

    def __init__(self, *, min_depth: float, max_depth: float, crop: EvalCrop = "none", protocol: str):
        self.min_depth, self.max_depth = min_depth, max_depth
        self.crop: EvalCrop = crop
        cut = "" if crop == "none" else f", {crop}'s crop"
        self.protocol = (
            f"{protocol}; at the original sizes, truth within {min_depth:g} to {max_depth:g} m{cut}, each image's "
            "errors averaged over images"
        )
        self._rows: dict[int, tuple[float, ...] | None] = {}

    def update(self, index: int, example: Example, prediction: DepthMap) -> float:
        """Measure one image.

        Returns:
            its delta1, the share of pixels within 25 %; 1 if its depth is unknown everywhere.

        Raises:
            ValueError: prediction and truth differ in size.
        """
        truth, predicted = example.target, prediction.depth
        if truth.shape != predicted.shape:
            raise ValueError(f"{example.name}: predicted a map of {predicted.shape}, the truth is {truth.shape}")
        known = (truth >= self.min_depth) & (truth <= self.max_depth) & inside(truth.shape, self.crop)
        row = None
        if known.any():
            row = errors(truth[known], predicted[known].clip(self.min_depth, self.max_depth))
        self._rows[index] = row
        return 1.0 if row is None else row[0]

    def gather(self) -> None:
        self._rows = gather_rows(self._rows)

    def compute(self) -> Scores:
        """The mean over images.

        Raises:
            ValueError: depth is unknown everywhere.
        """
        rows = [row for row in self._rows.values() if row is not None]
        if not rows:
            raise ValueError(
                f"none of the {len(self._rows)} images has a depth within {self.min_depth:g} to {self.max_depth:g} m"
            )
        values = {
            name: math.fsum(column) / len(rows) for name, column in zip(NAMES, zip(*rows, strict=True), strict=True)
        }
        return Scores(values, f"{len(rows)} images, {self.protocol}")


def errors(truth: np.ndarray, predicted: np.ndarray) -> tuple[float, ...]:
    """The numbers of NAMES for depths [n] in metres, all above 0; silog is multiplied by 100, as in KITTI."""
    truth, predicted = truth.astype(np.float64), predicted.astype(np.float64)
    ratio = np.maximum(truth / predicted, predicted / truth)
    gap, log_gap = predicted - truth, np.log(predicted) - np.log(truth)
    numbers = [
        (ratio < 1.25).mean(),
        (ratio < 1.25**2).mean(),
        (ratio < 1.25**3).mean(),
        (np.abs(gap) / truth).mean(),
        (gap**2 / truth).mean(),
        np.sqrt((gap**2).mean()),
        np.sqrt((log_gap**2).mean()),
        (np.abs(log_gap) / math.log(10)).mean(),
        100 * log_gap.std(),
    ]
    return tuple(float(number) for number in numbers)


def inside(size: tuple[int, int], crop: EvalCrop) -> np.ndarray:
    """bool [H, W]: the evaluated pixels."""
    mask = np.ones(size, dtype=bool)
    if crop == "none":
        return mask
    top, bottom, left, right = (
        int(a * b) for a, b in zip(CROPS[crop], (size[0], size[0], size[1], size[1]), strict=True)
    )
    mask[:] = False
    mask[top:bottom, left:right] = True
    return mask
