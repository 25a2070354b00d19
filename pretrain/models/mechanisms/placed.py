"""A mechanism on the output of a module: maps as they are, tokens as maps."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from pretrain.models.layers.mixer import Layout
from pretrain.models.layers.sync_batch_norm import synchronized
from pretrain.models.mechanisms import class_of
from pretrain.models.mechanisms.contract import MapMechanism
from pretrain.models.mechanisms.placebo import factors, of_next
from pretrain.models.mechanisms.settings import Placed


class Change(nn.Module):
    """x + strength * (m(x) - x), with a strength per channel that starts at 0: the network is then exactly the one
    without the mechanism m. With `start: paper` m(x) itself, as where m is an identity at its own start: two factors of
    0 would get no gradient.

    Batch norms of the mechanism take their statistics from the batches of all ranks.

    Args:
        dim: channels of x.

    Attributes:
        strength: [dim]; None: m(x) itself.
    """

    def __init__(self, given: Placed, dim: int):
        super().__init__()
        self.kind, self.reads, self.slot = given.kind, given.reads, given.where
        self.placebo = given.placebo
        self.mechanism = build_map(given, dim)
        needs_strength = given.start == "identity" and not self.mechanism.starts_as_identity
        self.strength = nn.Parameter(torch.zeros(dim)) if needs_strength else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps [b, C, H, W] -> the same shape and dtype."""
        out = self._of_next_image(x) if self.placebo else self.mechanism(x)
        if self.strength is None:
            return out.to(x.dtype)
        return (x + self.strength.view(1, -1, 1, 1) * (out - x)).to(x.dtype)

    def _of_next_image(self, x: Tensor) -> Tensor:
        """A gate's factors, or what a stage adds, from the next image; a gate's statistic gets no gradient."""
        if self.slot == "gate":
            return x * of_next(factors(x.detach(), self.mechanism(x.detach())))
        return x + of_next(self.mechanism(x) - x)

    def tokens(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """Tokens [b, P + k, D] -> the same shape. One that reads a set sees all of them, class token and registers too;
        one that reads the grid sees the patches, and the prefix passes.

        Raises:
            ValueError: it reads the grid, which the layout does not give.
        """
        return over_tokens(self, x, layout, self.reads, self.kind)


def build_map(given: Placed, dim: int) -> MapMechanism:
    """The mechanism of an entry for maps of `dim` channels; it keeps its own initial weights.

    Raises:
        ValueError: it cannot be built for this width.
    """
    return synchronized(cast(MapMechanism, class_of(given.kind)(dim, **given.options)))


def over_tokens(of_maps: nn.Module, x: Tensor, layout: Layout | None, reads: str, kind: str) -> Tensor:
    """Tokens [b, P + k, D] through a module of maps [b, D, H, W]; see `Change.tokens`.

    Raises:
        ValueError: it reads the grid, which the layout does not give.
    """
    if reads == "set":
        return of_maps(x.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)
    if layout is None or layout.keep is not None:
        raise ValueError(f"{kind} reads the grid of all patches; a part of them cannot be encoded alone")
    prefix, patches = x[:, : layout.num_prefix_tokens], x[:, layout.num_prefix_tokens :]
    maps = of_maps(patches.transpose(1, 2).unflatten(2, layout.grid))
    return torch.cat([prefix, maps.flatten(2).transpose(1, 2)], dim=1)
