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


def koleo_loss(features: Tensor, *, scope: Scope = "rank", neighbours: int = 1, group: int | None = None) -> Tensor:
    """-mean(log(distance of each L2-normalized row of [b, D] to its nearest other rows)), in fp32.

    Coincident rows count as the lower bound of the distance, without gradient.

    Args:
        scope: "rank" finds neighbours among the rows of this process; "all" among those of all processes, so that the
            mean over ranks, of value and gradient, does not depend on the number of ranks.
        neighbours: number of nearest rows whose distances are used.
        group: with scope "all", neighbours are searched within groups of this many rows, those of consecutive ranks; a
            multiple of b. None: among the rows of all ranks.

    Raises:
        ValueError: there are not enough rows.
    """
    with torch.autocast(features.device.type, enabled=False):
        own = F.normalize(features.float(), dim=-1)
        if scope == "rank" or distributed.is_alone():
            return _spread(own, own, 0, neighbours)
        rank, size = distributed.rank(), len(own)
        placed = own.new_zeros(distributed.world_size(), *own.shape)
        placed[rank] = own
        rows = distributed.sum_over_ranks(placed).flatten(0, 1)
        together = group or len(rows)
        at = rank * size // together * together
        rows, first = rows[at : at + together], rank * size - at
        return _spread(rows[first : first + size], rows, first, neighbours)


def nearest(own: Tensor, rows: Tensor, *, first: int, count: int = 1) -> Tensor:
    """Indices of the nearest other rows of each of the normalized [n, D], int64 [n, count].

    Args:
        rows: normalized [m, D], whose rows from `first` on are `own`.
    """
    similarity = own @ rows.T
    similarity[:, first : first + len(own)].fill_diagonal_(-2.0)
    return similarity.topk(count, dim=1).indices


def _spread(own: Tensor, rows: Tensor, first: int, count: int) -> Tensor:
    if len(rows) <= count:
        raise ValueError(
            f"KoLeo needs at least {count + 1} images at a time to find nearest neighbours, got {len(rows)}; "
            "use a larger batch, fewer accumulation steps, koleo_scope: all, or koleo_weight: 0"
        )
    with torch.no_grad():
        neighbours = nearest(own, rows, first=first, count=count)
    # eps inside the norm, as in F.pairwise_distance
    distance = torch.linalg.vector_norm(own[:, None] - rows[neighbours] + EPS, dim=-1).clamp(min=COINCIDENT)
    return -(distance + EPS).log().mean()
