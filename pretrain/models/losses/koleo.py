"""KoLeo: spread the features of a batch by the distance of each to its nearest neighbour (Sablayrolles et al. 2019,
"Spreading vectors for similarity search", eq. 3; as a regularizer of DINOv2, Oquab et al. 2023, section 4).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.core import distributed

EPS = 1e-8
# The precision of unit vectors in fp32 is about 1e-7. The direction between closer ones is rounding error: without this
# lower bound, a duplicate image would cause a gradient of 1e8 in that direction.
COINCIDENT = 1e-6

Scope = Literal["rank", "all"]


def koleo_loss(features: Tensor, *, scope: Scope = "rank") -> Tensor:
    """-mean(log(distance of each L2-normalized row of [b, D] to the nearest other row)), in fp32.

    Coincident rows count as the lower bound of the distance, without gradient.

    Args:
        scope: "rank" finds neighbours among the rows of this process, as the official code does; "all" among those of
            all processes, so that value and mean gradient over ranks do not depend on the number of ranks.

    Raises:
        ValueError: there is only one row.
    """
    with torch.autocast(features.device.type, enabled=False):
        own = F.normalize(features.float(), dim=-1)
        if scope == "rank" or distributed.is_alone():
            return _spread(own)
        placed = own.new_zeros(distributed.world_size(), *own.shape)
        placed[distributed.rank()] = own
        return _spread(distributed.sum_over_ranks(placed).flatten(0, 1))


def nearest(rows: Tensor) -> Tensor:
    """Index of the nearest other row of each of the normalized rows [n, D], int64 [n]."""
    return (rows @ rows.T).fill_diagonal_(-2.0).argmax(dim=1)


def _spread(rows: Tensor) -> Tensor:
    if len(rows) < 2:
        raise ValueError(
            "KoLeo needs at least 2 images at a time to find nearest neighbours, got 1; "
            "use a larger batch, fewer accumulation steps, koleo_scope: all, or koleo_weight: 0"
        )
    with torch.no_grad():
        neighbours = nearest(rows)
    # eps inside the norm, as in F.pairwise_distance
    distance = torch.linalg.vector_norm(rows - rows[neighbours] + EPS, dim=1).clamp(min=COINCIDENT)
    return -(distance + EPS).log().mean()
