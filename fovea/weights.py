"""Backbones with their weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.config import ModelSource
from finetune.locate import locate
from finetune.weights import open_source
from pretrain.core.machine.device import find_device
from pretrain.probes.extract import FeatureExtractor


def load(
    source: str | Path | ModelSource,
    *,
    timm: str | None = None,
    random: bool = False,
    img_size: int | tuple[int, int] | None = None,
    args: Mapping[str, Any] | None = None,
    device: str = "auto",
) -> FeatureExtractor:
    """Load a backbone to extract features with. Nothing is downloaded, and nothing in a file is executed.

    Args:
        source: a release or run of Fovea, a checkpoint file of another project (docs/weights.md), a folder of timm or
            Hugging Face, or a `ModelSource`, the section `model` of a fine-tuning configuration.
        timm: the name of the timm model whose weights `source` holds, where the file does not show it.
        random: the same architecture with random weights; `source` may then be a name of timm's registry.
        img_size: position tables are resampled to it; default: that of the source.
        args: what the source does not show: num_heads, norm_eps, ...
        device: auto, cpu or cuda.

    Raises:
        ConfigError: (a ValueError) the source is missing, damaged or does not match; every problem is listed.
    """
    where = find_device(device)
    if not isinstance(source, ModelSource):
        source = locate(source, timm=timm, random=random, img_size=img_size, args=args)
    opened = open_source(source)
    return FeatureExtractor(
        opened.backbone,
        mean=opened.mean,
        std=opened.std,
        title=opened.title,
        report=opened.report_lines,
        orientation=opened.orientation,
        value_range=opened.value_range,
        device=where,
    )
