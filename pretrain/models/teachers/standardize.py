"""Features in units of their own spread, so that teachers of different scales weigh alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.models.losses.center import PendingMean

EPS = 1e-6


class Standardize(nn.Module):
    """(x - mean) / std per channel over the images and positions of all ranks in the first steps; x in the first step.

    A forward pass in training adds to the statistics; `after_step` uses them, `discard_pending` discards them.

    Args:
        dim: channels. steps: that are counted; then the statistics stay.
    """

    mean: Tensor
    square: Tensor

    def __init__(self, dim: int, steps: int):
        super().__init__()
        self.steps = steps
        self.register_buffer("mean", torch.zeros(1, dim))
        self.register_buffer("square", torch.ones(1, dim))
        self._pending = PendingMean(), PendingMean()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> the same shape, fp32."""
        x = x.float()
        if self.training:
            rows = x.flatten(0, -2)
            self._pending[0].add(rows.sum(0), rows=len(rows))
            self._pending[1].add(rows.square().sum(0), rows=len(rows))
        variance = (self.square - self.mean.square()).clamp(min=0.0)
        return (x - self.mean[0]) / (variance[0] + EPS).sqrt()

    def after_step(self, step: int) -> None:
        """`step` counts completed steps."""
        if step > self.steps:
            return self.discard_pending()
        for pending, average in zip(self._pending, (self.mean, self.square), strict=True):
            pending.move(average, 1 - 1 / step)

    def discard_pending(self) -> None:
        for pending in self._pending:
            pending.discard()
