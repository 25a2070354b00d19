"""A backbone as it was opened from wherever its weights are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pretrain.models.backbones.contract import Backbone


@dataclass(frozen=True)
class OpenedBackbone:
    """A backbone with its weights, made for the image size of the configuration.

    mean, std     per channel of [0, 1] pixels, which it was trained with
    title         in words, for reports: "mae release runs/demo/release (random weights)"
    report_lines  how the weights fitted: matched, missing, unexpected, resized
    source        for records: kind, path, sha256 or the record of the release, random
    """

    backbone: Backbone
    mean: tuple[float, ...]
    std: tuple[float, ...]
    title: str
    report_lines: tuple[str, ...] = ()
    source: dict[str, Any] = field(default_factory=dict)
