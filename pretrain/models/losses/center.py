"""The centre of a teacher's logits (Caron et al. 2021, eq. 4): an EMA over batches of their mean over rows."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.core import distributed


class PendingMean:
    """Sum of rows over the micro-batches of a step and over ranks; discarded if the step is skipped."""

    def __init__(self) -> None:
        self._total: Tensor | None = None

    def add(self, total: Tensor, *, rows: int) -> None:
        """Add `rows` rows with sum `total` [K]."""
        counted = torch.cat([total, total.new_tensor([rows])])
        self._total = counted if self._total is None else self._total + counted

    def discard(self) -> None:
        self._total = None

    def move(self, center: Tensor, momentum: float) -> None:
        """center [1, K] = momentum * center + (1 - momentum) * mean, in place, over the rows of all ranks.

        Unchanged if nothing was added, or if the number of rows is 0 on all ranks.
        """
        if self._total is None:
            return
        total = distributed.all_reduce_sum(self._total)
        self._total = None
        mean = torch.where(total[-1] > 0, total[None, :-1] / total[-1], center)
        center.lerp_(mean, 1.0 - momentum)


def center_norm(center: Tensor) -> Tensor:
    """Norm of the centre, a scalar for the log."""
    return center.norm()
