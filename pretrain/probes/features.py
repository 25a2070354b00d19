"""The input of a probe: frozen features of a backbone, or raw pixels, gathered over ranks with their labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pretrain.core import distributed
from pretrain.models.backbones.contract import ImageEncoder

Features = dict[str, Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]
BOTH = "cls+patch_mean"


@torch.no_grad()
def backbone_features(backbone: ImageEncoder, images: Tensor) -> Features:
    """The usual summaries of an image or a clip, each [b, D] in fp32.

    "cls" is the class token and "patch_mean" the mean of the patch tokens, each where the backbone has them; "pooled"
    is the one vector of a backbone that gives no tokens.
    """
    if not backbone.provides & {"patches", "tubes"}:
        return {"pooled": backbone.forward_cls(images).float()}
    tokens = backbone(images).float()
    patch_mean = tokens[:, backbone.num_prefix_tokens :].mean(1)
    return {"cls": tokens[:, 0], "patch_mean": patch_mean} if backbone.class_token else {"patch_mean": patch_mean}


def pixel_features(images: Tensor) -> Features:
    """Raw normalized pixels [b, c*h*w]: what a probe reads without any network."""
    return {"pixels": images.float().flatten(1)}


def with_both(features: Features) -> Features:
    """The class token and the mean patch token also as one vector [n, 2D], class token first; else as it was."""
    if not {"cls", "patch_mean"} <= features.keys():
        return features
    return features | {BOTH: torch.cat([features["cls"], features["patch_mean"]], dim=1)}


def collect(batches: Batches, features: Callable[[Tensor], Features], device: torch.device) -> tuple[Features, Tensor]:
    """Run `features` over this rank's batches and gather those of all ranks: name -> [n, d], labels int64 [n].

    Raises:
        StoppedWaitingError: on every rank, one stopped waiting for its batches.
        ValueError: no rank has a labelled image.
    """
    rows: dict[str, list[Tensor]] = {}
    labels: list[Tensor] = []
    for images, truth in distributed.until_stopped(batches):
        labels.append(truth)
        for name, value in features(images.to(device, non_blocking=True)).items():
            rows.setdefault(name, []).append(value.cpu())
    mine = ({name: torch.cat(parts) for name, parts in rows.items()}, torch.cat(labels) if labels else torch.empty(0))
    shares = [share for share in distributed.all_gather_object(mine) if len(share[1])]
    if not shares:
        raise ValueError("the probe found no labelled image; shards need a .cls member per sample")
    gathered = {name: torch.cat([share[0][name] for share in shares]) for name in shares[0][0]}
    return gathered, torch.cat([share[1] for share in shares])
