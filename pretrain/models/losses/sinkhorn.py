"""Sinkhorn-Knopp assignments of a teacher to many prototypes, storing no logits.

Caron et al. 2020, "SwAV", section 3.1; in DINOv2 three iterations (Oquab et al. 2023, section 4).

The method scales exp(logits / temperature) until every prototype has the same mass and every row the mass 1. In
logarithms it adds one number to each prototype and one to each row; the last step on rows is a softmax. So its result
is softmax((logits - center) / temperature), with a centre from this batch instead of an average over past ones, and the
losses over prototypes accept either centre.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.core import distributed
from pretrain.models.heads.projection import Prototypes
from pretrain.models.losses.prototype_stream import KEPT_LOGITS, StreamedLogits, product_dtype

# Not `chunk_size`: ranks have different numbers of masked patches, but must run the same collectives.
CHUNK = {"cpu": 2048, "cuda": 4096}


@torch.no_grad()
def sinkhorn_center(rows: Tensor, layer: Prototypes, *, temp: float, iterations: int = 3) -> Tensor:
    """The centre [K], fp32, that turns softmax((logits - center) / temp) into the Sinkhorn-Knopp assignment.

    The rows of all ranks are one batch. A rank may have none.

    Args:
        rows: bottleneck features [n, D] of the teacher.
        iterations: number of scalings of prototypes, then rows; the last scaling of the rows is the softmax.

    Raises:
        ValueError: iterations is below 1.
    """
    if iterations < 1:
        raise ValueError(f"sinkhorn_center: iterations must be at least 1, got {iterations}")
    dtype = product_dtype(rows)
    with torch.autocast(rows.device.type, enabled=False):
        logits = _Repeated(StreamedLogits(rows, layer, dtype), 1 / temp)
        mass = torch.empty_like(logits.of.g)  # log mass of each prototype over the rows as scaled so far
        by_row = logits.of.dot
        size = CHUNK[rows.device.type]
        for iteration in range(iterations):
            total = torch.full_like(by_row, float("-inf"))
            for start in range(0, len(mass), size):
                chunk = slice(start, start + size)
                sharp = logits.of_chunk(chunk)
                mass[chunk] = lse_over_ranks((sharp + by_row).logsumexp(dim=0))
                if iteration < iterations - 1:
                    total = torch.logaddexp(total, (sharp - mass[chunk]).logsumexp(dim=1, keepdim=True))
            by_row = -total
        return mass.mul_(temp)


class _Repeated:
    """The sharpened logits of a chunk, recomputed or kept."""

    def __init__(self, of: StreamedLogits, sharpness: float):
        self.of, self.sharpness = of, sharpness
        self.keep = len(of.rows) * len(of.g) <= KEPT_LOGITS
        self._kept: dict[int, Tensor] = {}

    def of_chunk(self, chunk: slice) -> Tensor:
        """Logits fp32 [n, k]; read-only."""
        if chunk.start in self._kept:
            return self._kept[chunk.start]
        sharp = self.of.measure(chunk).compute(chunk).mul_(self.sharpness)
        if self.keep:
            self._kept[chunk.start] = sharp
        return sharp


def lse_over_ranks(lse: Tensor) -> Tensor:
    """logsumexp [...] over the rows of all ranks, from those of each."""
    return lse if distributed.is_alone() else distributed.all_gather(lse[None]).logsumexp(dim=0)
