"""Which tokens an output comes from: rollout of attention maps, and their relevance for one output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rollout(maps: Sequence[Tensor], *, start: int = 0) -> Tensor:
    """[b, s, s]: the share of each input token (column) in each output token (row); rows sum to 1.

    The product over the blocks, the later on the left, of A + I with rows divided by their sum, A the mean over the
    heads (Abnar & Zuidema 2020, eq. 1). It does not depend on a class.

    Args:
        maps: attention probabilities [b, h, s, s] of every block, in order. start: the first block that counts.

    Raises:
        ValueError: the maps are not square and of one size, or there is none from `start`.
    """
    _check(maps, start)
    product = _identity(maps[0])
    for probabilities in maps[start:]:
        mixed = probabilities.mean(1) + _identity(probabilities)
        product = mixed / mixed.sum(-1, keepdim=True) @ product
    return product


def relevance(maps: Sequence[Tensor], gradients: Sequence[Tensor], *, start: int = 0) -> Tensor:
    """[b, s, s]: how much each input token (column) spoke for one score, through each output token (row).

    R = I, then per block R += mean over heads of max(0, dA * A) times R (Chefer et al. 2021, eq. 5 and 6). The row of
    the token that the score reads, without its own column, is the map of the image.

    Args:
        maps: attention probabilities [b, h, s, s] of every block, in order.
        gradients: of the scores, one per sample, with respect to them; gradients of the sum of the scores do, as
            samples do not interact.
        start: the first block that counts.

    Raises:
        ValueError: as of `rollout`, or there is not a gradient for each map.
    """
    _check(maps, start)
    if [g.shape for g in gradients] != [m.shape for m in maps]:
        raise ValueError(f"{len(maps)} maps need as many gradients of their shapes, got {len(gradients)}")
    total = _identity(maps[0])
    for probabilities, gradient in zip(maps[start:], gradients[start:], strict=True):
        total = total + (probabilities * gradient).clamp(min=0).mean(1) @ total
    return total


def _identity(maps: Tensor) -> Tensor:
    return torch.eye(maps.shape[-1], dtype=maps.dtype, device=maps.device)


def _check(maps: Sequence[Tensor], start: int) -> None:
    if not 0 <= start < len(maps):
        raise ValueError(f"start must be one of {len(maps)} blocks, got {start}")
    shapes = {tuple(m.shape) for m in maps}
    if len(shapes) != 1 or maps[0].ndim != 4 or maps[0].shape[2] != maps[0].shape[3]:
        raise ValueError(
            f"attention maps must be [b, h, s, s] over the same tokens in every block, got {sorted(shapes)}; "
            "windows and pooled tokens cannot be chained"
        )
