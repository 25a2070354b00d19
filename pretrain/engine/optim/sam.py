"""Sharpness-aware steps: the gradient is taken at the worst point close to the weights (Foret et al. 2021).

A step has two passes over its batch. The first gives the gradient at the weights; they are moved by e along it, the
second pass gives the gradient there, and the update is made from where they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import (
    Tensor,
    _foreach_norm,  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
)

_EPS = 1e-12


@torch.no_grad()
def gradient_norm(weights: Sequence[Tensor], gradients: Sequence[Tensor], *, adaptive: bool) -> Tensor:
    """The norm over all gradients together, of each times its |w| if adaptive. A scalar."""
    values = [w.abs() * g for w, g in zip(weights, gradients, strict=True)] if adaptive else list(gradients)
    return torch.stack(_foreach_norm(values)).square().sum().sqrt()


@torch.no_grad()
def perturb(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], *, rho: float, adaptive: bool, norm: Tensor
) -> Callable[[], None]:
    """Add e to the weights, in place; what it returns sets them back, bitwise.

    e = rho g / norm (Foret et al. 2021, eq. 2), adaptive: rho w^2 g / norm (Kwon et al. 2021, eq. 7); weight decay has
    no part in it.

    Args:
        gradients: averaged over ranks, so that all ranks move alike. norm: from `gradient_norm`.
    """
    before = [w.detach().clone() for w in weights]
    scale = rho / (norm + _EPS)
    for w, g in zip(weights, gradients, strict=True):
        w.add_(w.square() * g * scale if adaptive else g * scale)

    @torch.no_grad()
    def restore() -> None:
        for w, value in zip(weights, before, strict=True):
            w.copy_(value)

    return restore
