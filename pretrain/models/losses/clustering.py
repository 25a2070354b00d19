"""Online clustering of a teacher's patches, balanced at each position of the image (Darcet et al. 2025, "Cluster and
Predict Latent Patches for Improved Masked Image Modeling", sections 3.1 and 3.2).

Sinkhorn-Knopp scales exp(logits / temperature) of the patches at one position of all images until every cluster has
the same mass and every patch the mass 1, so that a cluster cannot stand for a position. As in `sinkhorn` the scaling
of the clusters is all that is kept: it turns a softmax of the logits into the assignment. Logits are computed for some
positions at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.losses.prototype_stream import Gradients, differentiable_once, product_dtype
from pretrain.models.losses.sinkhorn import lse_over_ranks

LOG_EPS = math.log(1e-8)  # added to every sum that is divided by, as in the official code
LOGITS = {"cpu": 2**22, "cuda": 2**26}  # held at a time


class ClusteringLoss(NamedTuple):
    """`loss` is differentiable; the others are not.

    Attributes:
        loss: mean cross-entropy of assignments and predictions over all patches.
        entropy: mean entropy of an assignment, in nats.
        mean_entropy: entropy of the mean assignment at a position, mean over positions; log K when the images use all
            clusters equally.
    """

    loss: Tensor
    entropy: Tensor
    mean_entropy: Tensor


class OnlineClustering(nn.Module):
    """A linear layer whose K outputs are clusters: it learns to predict their balanced assignments.

    Parameters: weight [K, D], bias [K]. Rows are features of length 1, see `unit`.

    Args:
        target_temp: of the assignments. pred_temp: of the predictions. iterations: of Sinkhorn-Knopp, at least 1.
        positionwise: balance at each position; False: over all patches of all images together.
    """

    def __init__(
        self,
        dim: int,
        num_clusters: int,
        *,
        target_temp: float,
        pred_temp: float,
        iterations: int = 3,
        bias: bool = True,
        positionwise: bool = True,
    ):
        super().__init__()
        self.target_temp, self.pred_temp = target_temp, pred_temp
        self.iterations, self.positionwise = iterations, positionwise
        self.weight = nn.Parameter(torch.randn(num_clusters, dim))
        self.bias = nn.Parameter(torch.zeros(num_clusters)) if bias else None

    @torch.no_grad()
    def masses(self, rows: Tensor) -> Tensor:
        """Log mass of each cluster, fp32 [N, K], for `assign`; the images of all ranks are one batch.

        Args:
            rows: [b, N, D], with the same b and N on every rank. All positions together give [1, K].
        """
        rows, dtype = rows if self.positionwise else rows.flatten(0, 1)[:, None], product_dtype(rows)
        with torch.autocast(rows.device.type, enabled=False):
            parts = [self._balance(self._logits(rows[:, at], dtype)) for at in self._chunks(rows)]
        return torch.cat(parts)

    @torch.no_grad()
    def assign(self, rows: Tensor, masses: Tensor) -> Tensor:
        """Assignments [..., K] of rows [..., D] by the masses [..., K] of their positions."""
        dtype = product_dtype(rows)
        with torch.autocast(rows.device.type, enabled=False):
            return (self._logits(rows, dtype) / self.target_temp - masses).softmax(dim=-1)

    def loss(self, rows: Tensor, masses: Tensor) -> ClusteringLoss:
        """Of rows [b, N, D] with the `masses` of their step. Backward can run only once."""
        dtype = product_dtype(rows)

        def compute(with_gradients: bool) -> tuple[tuple[Tensor, ...], Gradients | None]:
            count = rows.shape[0] * rows.shape[1]
            sums = masses.new_zeros(3)
            by_rows = torch.zeros_like(rows, dtype=torch.float32) if rows.requires_grad else None
            by_weight = torch.zeros_like(self.weight, dtype=torch.float32)
            by_bias = masses.new_zeros(len(self.weight))
            for at in self._chunks(rows):
                logits = self._logits(rows[:, at], dtype)
                of_chunk = masses[at] if self.positionwise else masses
                target = (logits / self.target_temp - of_chunk).softmax(dim=-1)
                log_pred = F.log_softmax(logits / self.pred_temp, dim=-1)
                mean = target.mean(dim=0)
                sums -= torch.stack([(target * log_pred).sum(), _plogp(target), _plogp(mean) * len(rows)])
                if with_gradients:
                    difference = log_pred.exp_().sub_(target)
                    by_bias += difference.sum(dim=(0, 1))
                    difference = difference.flatten(0, 1).to(dtype)
                    by_weight += (difference.T @ rows[:, at].flatten(0, 1).to(dtype)).float()
                    if by_rows is not None:
                        by_rows[:, at] = (difference @ self.weight.to(dtype)).float().unflatten(0, (len(rows), -1))
            if not with_gradients:
                return (sums / count).unbind(), None
            for gradient in (by_rows, by_weight, by_bias):
                if gradient is not None:
                    gradient /= self.pred_temp * count
            return (sums / count).unbind(), (by_rows, by_weight, None if self.bias is None else by_bias)

        return ClusteringLoss(*differentiable_once(rows, self.weight, self.bias, compute))

    def _logits(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        logits = (rows.to(dtype) @ self.weight.to(dtype).T).float()
        return logits if self.bias is None else logits + self.bias.float()

    def _balance(self, logits: Tensor) -> Tensor:
        """Log masses [P, K] from logits [b, P, K], which are overwritten.

        The logits of the clusters and of the rows are divided in turn; the last division of the rows is the softmax.
        """
        scaled = logits.div_(self.target_temp)
        total = lse_over_ranks(scaled.logsumexp(dim=0))
        scaled -= total
        for _ in range(self.iterations - 1):
            scaled -= _plus_eps(scaled.logsumexp(dim=2, keepdim=True))
            mass = _plus_eps(lse_over_ranks(scaled.logsumexp(dim=0)))
            scaled -= mass
            total += mass
        return total

    def _chunks(self, rows: Tensor) -> Iterator[slice]:
        """Ranges of positions of rows [b, N, D], the same on every rank."""
        size = max(1, LOGITS[rows.device.type] // (len(rows) * len(self.weight)))
        for start in range(0, rows.shape[1], size):
            yield slice(start, start + size)


def unit(x: Tensor) -> Tensor:
    """Features [..., D] -> fp32 vectors of length 1."""
    return F.normalize(x.float(), dim=-1, eps=1e-7)


def _plus_eps(log_sum: Tensor) -> Tensor:
    return torch.logaddexp(log_sum, torch.full_like(log_sum, LOG_EPS))


def _plogp(probabilities: Tensor) -> Tensor:
    return torch.xlogy(probabilities, probabilities).sum()
