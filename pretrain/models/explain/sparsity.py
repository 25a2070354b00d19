"""How few keys hold most of the attention of a query."""

from __future__ import annotations

from torch import Tensor

MASS = 0.9  # share of the attention that is counted


def tokens_for_mass(weights: Tensor) -> Tensor:
    """Share of the keys that hold 90 % of a query's attention [..., keys], mean over all queries: a scalar, fp64."""
    mass = weights.detach().sort(-1, descending=True).values.double().cumsum(-1)
    return ((mass < MASS).sum(-1) + 1).double().mean() / weights.shape[-1]
