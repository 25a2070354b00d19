"""A backbone with its weights, of whatever source."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pretrain.core.images import Orientation, ValueRange
from pretrain.models.backbones.contract import Backbone


@dataclass(frozen=True)
class OpenedBackbone:
    """A backbone with its weights, built for the image size of the configuration.

    mean, std     normalization of [0, 1] pixels that it was trained with, per channel
    title         in words, for reports: "mae release runs/demo/release (random weights)"
    report_lines  match of the weights: matched, missing, unexpected, resized
    value_range   of images of more than 8 bits, of a release as that of its training
    orientation   how photos of files are read: of a release as those it was trained on
    source        for records: kind, path, sha256 or the record of the release, random
    """

    backbone: Backbone
    mean: tuple[float, ...]
    std: tuple[float, ...]
    title: str
    report_lines: tuple[str, ...] = ()
    source: dict[str, Any] = field(default_factory=dict)
    orientation: Orientation = "exif"
    value_range: ValueRange | None = None
