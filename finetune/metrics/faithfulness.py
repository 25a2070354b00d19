"""Whether a map of importance is true of the network: deletion and insertion (Petsiuk et al. 2018, sec. 3.3).

Pixels are replaced in the order of decreasing importance, and the probability of the class is followed: a faithful map
lets it fall early when pixels are deleted and rise early when they are inserted. The numbers depend on the step, the
substrate and the image size; only those of equal settings can be compared.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Model = Callable[[Tensor], Tensor]


@torch.no_grad()
def deletion(model: Model, images: Tensor, importance: Tensor, substrate: Tensor, *, step: int) -> Tensor:
    """Probabilities [b, n + 1] of the class that the full images [b, C, H, W] have, n = ceil(H W / step).

    The first is that of the images, the last that of the substrate.

    Args:
        model: images -> probabilities [b, K]. importance: [b, H, W]. substrate: [b, C, H, W], the pixels of nothing:
            0, or the blurred images. step: pixels that are replaced at once.

    Raises:
        ValueError: the step is not positive, or the shapes do not fit.
    """
    return _follow(model, images, substrate, images, importance, step)


@torch.no_grad()
def insertion(model: Model, images: Tensor, importance: Tensor, substrate: Tensor, *, step: int) -> Tensor:
    """As `deletion`, from the substrate to the images."""
    return _follow(model, substrate, images, images, importance, step)


def area(curve: Tensor) -> Tensor:
    """Areas [b] under curves [b, n + 1] over the share of replaced pixels, by trapezes: in [0, 1] for probabilities."""
    return torch.trapezoid(curve, dim=-1) / (curve.shape[-1] - 1)


def _follow(model: Model, start: Tensor, end: Tensor, images: Tensor, importance: Tensor, step: int) -> Tensor:
    b, _, height, width = images.shape
    if step < 1:
        raise ValueError(f"step must be at least 1 pixel, got {step}")
    if importance.shape != (b, height, width) or start.shape != end.shape:
        raise ValueError(
            f"images {list(images.shape)} need an importance [{b}, {height}, {width}] and a substrate of their shape, "
            f"got {list(importance.shape)} and {list((end if start is images else start).shape)}"
        )
    order = importance.flatten(1).argsort(dim=1, stable=True).flip(1)
    now, end = start.flatten(2).clone(), end.flatten(2)
    classes = model(images).argmax(1, keepdim=True)
    scores = [model(now.view_as(images)).gather(1, classes)]
    for chosen in order.split(step, dim=1):
        index = chosen[:, None].expand(-1, images.shape[1], -1)
        now.scatter_(2, index, end.gather(2, index))
        scores.append(model(now.view_as(images)).gather(1, classes))
    return torch.cat(scores, dim=1)
