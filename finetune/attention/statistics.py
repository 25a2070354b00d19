"""What the weights of a module look like over a set of images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.models.explain.sparsity import tokens_for_mass


@dataclass(frozen=True)
class Measured:
    """Statistics of the weights of one module.

    Attributes:
        mean: [...], over the images. images: how many.
        dependence: share of the variance of the weights that is between images, 0 (the same weights for every image) to
            1; NaN where all weights are one number.
        entropy: of attention and router, over log of their number: 0 (one is chosen) to 1 (uniform); NaN for gates.
        hoyer: sparsity 0 (all equal) to 1 (one is not 0) of Hoyer 2004, eq. 5, over the keys, channels or branches.
        tokens_for_mass: share of the keys that hold 90 % of a query's attention; NaN for gates and routers.
        distance: mean distance in patches from a patch to what it attends to; None where there is no grid, or where the
            class token alone attends.
    """

    mean: Tensor
    images: int
    dependence: float
    entropy: float
    hoyer: float
    tokens_for_mass: float
    distance: float | None


class Gathering:
    """Sums over batches of the weights [b, ...] of one module, from which `measured` computes its statistics.

    Args:
        kind: see `weights.Source`. grid: rows and columns of the patches, where attention is between tokens.
        num_prefix_tokens: tokens before the patches.
    """

    def __init__(self, kind: str, grid: tuple[int, int] | None = None, num_prefix_tokens: int = 0):
        self.kind, self.grid, self.prefix = kind, grid, num_prefix_tokens
        self.count = 0
        self.sums = torch.zeros(4, dtype=torch.float64)  # entropy, hoyer, tokens for mass, distance
        self.total: Tensor | None = None
        self.squares: Tensor | None = None

    def __call__(self, weights: Tensor) -> Tensor:
        """Add a batch; returns it unchanged."""
        w = weights.detach().double()
        if self.total is None or self.squares is None:
            self.total, self.squares = torch.zeros_like(w[0]), torch.zeros_like(w[0])
        if w.shape[1:] != self.total.shape:
            raise ValueError(f"weights of another size: {list(w.shape[1:])}, before {list(self.total.shape)}")
        self.count += len(w)
        self.total += w.sum(0)
        self.squares += w.square().sum(0)
        self.sums += (
            len(w)
            * torch.stack(
                [
                    self._entropy(w),
                    _hoyer(w.mean((2, 3)) if self.kind == "gate" else w),
                    self._tokens(w),
                    self._distance(w),
                ]
            ).cpu()
        )
        return weights

    @property
    def mean(self) -> Tensor:
        """[...], over the images so far."""
        assert self.total is not None, "no forward pass has come through this module"
        return self.total / self.count

    def measured(self) -> Measured:
        assert self.squares is not None, "no forward pass has come through this module"
        entropy, hoyer, tokens, distance = (self.sums / self.count).tolist()
        between = (self.squares / self.count - self.mean.square()).clamp(min=0).mean()
        total = self.squares.mean() / self.count - self.mean.mean().square()
        dependence = float(between / total) if total > 1e-12 else math.nan
        found = None if math.isnan(distance) else distance
        return Measured(self.mean, self.count, dependence, entropy, hoyer, tokens, found)

    def _entropy(self, w: Tensor) -> Tensor:
        if self.kind == "gate" or w.shape[-1] < 2:
            return w.new_tensor(math.nan)
        return -(w * w.clamp(min=1e-30).log()).sum(-1).mean() / math.log(w.shape[-1])

    def _tokens(self, w: Tensor) -> Tensor:
        if self.kind != "attention":
            return w.new_tensor(math.nan)
        return tokens_for_mass(w)

    def _distance(self, w: Tensor) -> Tensor:
        if self.kind != "attention" or self.grid is None:
            return w.new_tensor(math.nan)
        tokens = self.prefix + math.prod(self.grid)
        if w.shape[-2:] != (tokens, tokens):  # no grid, or the class token alone is computed
            return w.new_tensor(math.nan)
        rows, columns = (torch.arange(side, dtype=w.dtype, device=w.device) for side in self.grid)
        places = torch.cartesian_prod(rows, columns)
        patches = w[..., self.prefix :, self.prefix :]
        return (patches * torch.cdist(places, places)).sum(-1).div(patches.sum(-1).clamp(min=1e-30)).mean()


def _hoyer(w: Tensor) -> Tensor:
    """Of the last axis."""
    w = w.flatten(2).mean(2) if w.ndim == 4 and w.shape[2:] != w.shape[-2:] else w
    n = w.shape[-1]
    if n < 2:
        return w.new_tensor(math.nan)
    ratio = w.abs().sum(-1) / w.norm(dim=-1).clamp(min=1e-30)
    return ((math.sqrt(n) - ratio) / (math.sqrt(n) - 1)).mean()
