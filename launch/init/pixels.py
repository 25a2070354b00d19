"""A segmenter or a depth estimator for a data set: crops, windows and classes from a look at its maps."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.data.examples import BadExample, Examples
from finetune.data.maps.label_maps import VOID
from launch.init.machine import Target
from launch.init.text import Choice
from launch.init.training import Backbone, Length, length, multiple

LOOKED_AT = 64  # maps that are read
MOST_CPU, MOST_GPU = 128, 512  # pixels of a crop: that of configs/finetune/nuclei_semantic_small.yaml, that of ADE20K
COMMON = 0.6  # share of the pixels of a class, from which crops full of it are no exception


@dataclass(frozen=True)
class Look:
    """sizes: int [n, 2], (height, width) of images. targets: their maps."""

    sizes: np.ndarray
    targets: list[np.ndarray]


def look(examples: Examples) -> Look:
    """Up to LOOKED_AT examples, evenly spaced. ValueError: none can be read."""
    places = np.linspace(0, len(examples) - 1, min(LOOKED_AT, len(examples))).astype(int).tolist()
    found = []
    for place in places:
        with suppress(BadExample):  # a check names them
            found.append(examples[place])
    if not found:
        raise ValueError(f"none of {len(places)} images can be read with its map")
    return Look(np.array([example.image.shape[:2] for example in found]), [example.target for example in found])


def segmentation(
    examples: Examples, backbone: Backbone, where: Target, background: str | None
) -> tuple[list[Choice], Length]:
    """The section `task`, and the length of the run.

    Args:
        background: of COCO instances: the class of all other pixels.
    """
    seen = look(examples)
    counts = np.sum([np.bincount(target.ravel(), minlength=VOID + 1) for target in seen.targets], axis=0)
    shares = counts[: len(examples.classes)] / max(counts[:VOID].sum(), 1)
    order = np.argsort(-shares)
    listed = ", ".join(f"{examples.classes[i]} {shares[i]:.1%}" for i in order[:8])
    head: dict[str, Any] = {"name": "upernet"}
    about = f"{len(examples.classes)} classes. UPerNet reads four maps."
    if backbone.plain and backbone.depth < 4:
        head, about = {"name": "linear"}, f"{len(examples.classes)} classes. The network has no four maps for UPerNet."
    elif backbone.kind != "large":
        head |= {"width": 64, "auxiliary_width": 32}
    choices = [
        Choice("task.name", "segmentation"),
        Choice("task.head", head, about),
    ]
    if background is not None:
        text = "Pixels outside every object are this class; without it they would be void."
        choices.append(Choice("task.background", background, text))
    why = f"Shares of the pixels of {len(seen.targets)} maps: {listed}{', ...' if len(order) > 8 else ''}."
    if shares.max(initial=0) > COMMON:
        choices.append(Choice("task.cat_max_ratio", 0.95, f"{why} A class fills most crops; that is no exception."))
    choices += _views(seen, backbone, where, [0.5, 2.0] if where.gpu else [0.75, 1.5])
    if shares.max(initial=0) <= COMMON:
        choices.append(Choice("task.cat_max_ratio", 0.75, f"{why} A crop full of one class is drawn again."))
    return choices, length(len(examples), 16, views=2000, epochs=10, gpu=where.gpu)


def depth(examples: Examples, backbone: Backbone, where: Target, units: float) -> tuple[list[Choice], Length]:
    """The section `task`, and the length of the run. units: of the maps, per metre."""
    seen = look(examples)
    known = np.concatenate([target[target > 0].ravel()[::97] for target in seen.targets])
    if not known.size:
        raise ValueError(f"no depth above 0 in {len(seen.targets)} maps; check units per metre: task.units_per_metre")
    low, middle, high = (float(value) for value in np.percentile(known, (0.5, 50, 99.5)))
    unit = (
        f"Depths with {units:g} units per metre: 0.5 % below {low:.3g} m, median {middle:.3g}, 0.5 % above {high:.3g}."
    )
    choices = [
        Choice("task.name", "depth"),
        Choice("task.head", {"name": "linear"}, "DINOv2's: each pixel is classified into bins of depth."),
        Choice("task.units_per_metre", units, "Of 16-bit maps: 1000 are millimetres; KITTI has 256."),
        Choice("task.min_depth", float(f"{max(low / 2, 0.001):.2g}"), unit),
        Choice("task.max_depth", float(f"{high * 1.1:.3g}")),
        *_views(seen, backbone, where, [1.0, 1.0]),
    ]
    return choices, length(len(examples), 16, views=2000, epochs=10, gpu=where.gpu)


def _views(seen: Look, backbone: Backbone, where: Target, scale: list[float]) -> list[Choice]:
    """Crop, stride and scale from the sizes of the images."""
    shorter = np.sort(seen.sizes, axis=1)[:, 0]
    usual = float(np.median(shorter))
    most, unit = (MOST_GPU if where.gpu else MOST_CPU), max(backbone.strides)
    crop = min(multiple(min(usual, most), unit), most // unit * unit or unit)
    text = f"The shorter sides of the images have {usual:.0f} px in the median; crops up to {most} px on {where.name}."
    choices = [Choice("task.crop", crop, text)]
    if usual > 2 * crop:
        choices.append(Choice("task.resize", 2 * crop, "Images are made smaller, so that a crop shows enough of them."))
    choices.append(Choice("task.scale", scale))
    if usual > crop:
        stride = max(unit, crop * 3 // 4 // unit * unit)
        choices.append(Choice("task.slide", True, "Prediction in windows of the crop, which overlap."))
        choices.append(Choice("task.stride", stride))
    return choices
