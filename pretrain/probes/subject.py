"""The network that `fovea probe` asks: a release or an official checkpoint, and the same network untrained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pretrain.models.importers import load_official, load_strict
from pretrain.models.release import IMAGENET_MEAN, IMAGENET_STD, read_release
from pretrain.models.sizes import SIZES
from pretrain.models.vit import ViT
from pretrain.models.vit_facts import vit_arguments

# What an untrained network of the kind starts with; the weights show a table alone.
_FIXED_POSITIONS = {"mae": "sincos", "mocov3": "sincos_rows_first", "ijepa": "sincos"}


@dataclass(frozen=True)
class Subject:
    """`backbone` is in eval mode; `untrained(seed)` builds its like with initial weights. size: (h, w) in pixels."""

    title: str
    backbone: nn.Module
    untrained: Callable[[int], nn.Module]
    size: tuple[int, int]
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def open_release(folder: Path) -> Subject:
    """A folder written by `fovea release`.

    Raises:
        ValueError: it is no release, or is damaged.
    """
    release = read_release(folder)
    assert release.record is not None
    backbone: Any = release.build()
    return Subject(
        title=f"{release.kind}, {folder}",
        backbone=backbone.eval(),
        untrained=_seeded(release.untrained),
        size=tuple(backbone.img_size),
        in_chans=backbone.in_chans,
        mean=tuple(release.record["mean"]),
        std=tuple(release.record["std"]),
    )


def open_official(path: Path) -> Subject:
    """A checkpoint of an official code or of timm, with ImageNet's mean and standard deviation.

    Raises:
        ValueError: it is no ViT of a known size.
    """
    weights = load_official(path)
    arguments = vit_arguments(weights.backbone, grid=weights.grid)
    width, depth, channels = (arguments[name] for name in ("embed_dim", "depth", "in_chans"))
    if (width, depth) not in {(size["embed_dim"], size["depth"]) for size in SIZES.values()} or channels != 3:
        raise ValueError(
            f"{path}: {channels} channels, width {width}, {depth} blocks: not an RGB ViT of a known size "
            f"({', '.join(SIZES)}); continue pretraining from it (init.official) and probe that release"
        )
    if "pos_embed" in weights.backbone:
        arguments["pos_embed"] = _FIXED_POSITIONS.get(weights.kind, "learned")
    backbone = ViT(**arguments)
    load_strict(backbone, weights.backbone, grid=weights.grid)
    title = f"{weights.kind}, {path}"
    untrained = _seeded(lambda: ViT(**arguments))
    return Subject(title, backbone.eval(), untrained, arguments["img_size"], channels, IMAGENET_MEAN, IMAGENET_STD)


def _seeded(build: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    def untrained(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build().eval()

    return untrained
