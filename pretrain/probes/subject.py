"""The network that `fovea probe` asks: a release or an official checkpoint, and the same network untrained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.models.importers import load_official, load_strict
from pretrain.models.release import IMAGENET_MEAN, IMAGENET_STD, read_release
from pretrain.models.sizes import SIZES
from pretrain.models.vit import ViT


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
    arguments = vit_arguments(weights.backbone, weights.grid, path)
    backbone = ViT(**arguments)
    load_strict(backbone, weights.backbone, grid=weights.grid)
    title = f"{weights.kind}, {path}"
    size, channels = arguments["img_size"], arguments["in_chans"]
    untrained = _seeded(lambda: ViT(**arguments))
    return Subject(title, backbone.eval(), untrained, size, channels, IMAGENET_MEAN, IMAGENET_STD)


def vit_arguments(state: dict[str, Tensor], grid: tuple[int, int] | None, source: Path) -> dict[str, Any]:
    """The arguments of `ViT` that a state dict tells by its shapes; the heads by its width and depth.

    Raises:
        ValueError: no size of the table has this width and depth, or the channels are not RGB.
    """
    dim, channels, patch, _ = state["patch_embed.proj.weight"].shape
    depth = 1 + max((int(name.split(".")[1]) for name in state if name.startswith("blocks.")), default=-1)
    known = {(size["embed_dim"], size["depth"]): size for size in SIZES.values()}
    if (dim, depth) not in known or channels != len(IMAGENET_MEAN):
        raise ValueError(
            f"{source}: {channels} channels, width {dim}, {depth} blocks: not an RGB ViT of a known size "
            f"({', '.join(SIZES)}); continue pretraining from it (init.official) and probe that release"
        )
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    if grid is None:
        side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
        grid = (side, side)
    size = (grid[0] * patch, grid[1] * patch)
    return {
        "img_size": size,
        "patch_size": patch,
        "in_chans": channels,
        "num_registers": registers,
        **known[dim, depth],
    }


def _seeded(build: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    def untrained(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build().eval()

    return untrained
