"""Sinkhorn-Knopp assignments of a teacher over many prototypes, storing no logits.

Caron et al. 2020, "SwAV", section 3.1; in DINOv2 three iterations (Oquab et al. 2023, section 4).

The method scales exp(logits / temperature) until every prototype holds the same mass and every row the mass 1. In
logarithms it adds one number to each prototype and one to each row; the last row step is a softmax. So its result is
softmax((logits - center) / temperature), where the centre comes from this batch instead of from an average over past
ones, and the losses over prototypes take it as they take the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.core import distributed
from pretrain.models.heads.projection import Prototypes
from pretrain.models.losses.prototype_stream import KEPT_LOGITS, StreamedLogits, product_dtype

# Not `chunk_size`: ranks hold different numbers of masked patches, and must meet in the same collectives.
CHUNK = {"cpu": 2048, "cuda": 4096}


@torch.no_grad()
def sinkhorn_center(rows: Tensor, layer: Prototypes, *, temp: float, iterations: int = 3) -> Tensor:
    """The centre [K], fp32, that turns softmax((logits - center) / temp) into the Sinkhorn-Knopp assignment.

    All ranks together: their rows are one batch. A rank may have none.

    Args:
        rows: bottlenecks [n, D] of the teacher.
        iterations: times that prototypes, then rows are scaled; the last scaling of the rows is the softmax.

    Raises:
        ValueError: iterations is below 1.
    """
    if iterations < 1:
        raise ValueError(f"sinkhorn_center: iterations must be at least 1, got {iterations}")
    dtype = product_dtype(rows)
    with torch.autocast(rows.device.type, enabled=False):
        logits = _Repeated(StreamedLogits(rows, layer.weight_v, layer.weight_g, dtype), 1 / temp)
        mass = torch.empty_like(logits.of.g)  # log of what a prototype holds of the rows, as they are scaled so far
        by_row = logits.of.dot
        size = CHUNK[rows.device.type]
        for iteration in range(iterations):
            total = torch.full_like(by_row, float("-inf"))
            for start in range(0, len(mass), size):
                chunk = slice(start, start + size)
                sharp = logits.of_chunk(chunk)
                mass[chunk] = _over_ranks((sharp + by_row).logsumexp(dim=0))
                if iteration < iterations - 1:
                    total = torch.logaddexp(total, (sharp - mass[chunk]).logsumexp(dim=1, keepdim=True))
            by_row = -total
        return mass.mul_(temp)


class _Repeated:
    """The sharpened logits of a chunk, computed again or kept."""

    def __init__(self, of: StreamedLogits, sharpness: float):
        self.of, self.sharpness = of, sharpness
        self.keep = len(of.rows) * len(of.g) <= KEPT_LOGITS
        self._kept: dict[int, Tensor] = {}

    def of_chunk(self, chunk: slice) -> Tensor:
        """fp32 [n, k]; not to be written to."""
        if chunk.start in self._kept:
            return self._kept[chunk.start]
        sharp = self.of.measure(chunk).compute(chunk).mul_(self.sharpness)
        if self.keep:
            self._kept[chunk.start] = sharp
        return sharp


def _over_ranks(lse: Tensor) -> Tensor:
    """logsumexp [k] of every rank's rows together."""
    return lse if distributed.is_alone() else distributed.all_gather(lse[None]).logsumexp(dim=0)
