"""Depth as an expectation over bins, and its losses.

Bhat et al. 2021 ("AdaBins", section 3) with fixed bins, as Oquab et al. 2023 ("DINOv2", section 7.4) use it; the
scale-invariant loss of Eigen et al. 2014 (equation 4) as its square root; gradients matched at four scales as Li &
Snavely 2018 ("MegaDepth", equation 4) and Ranftl et al. 2020 do.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

GRADIENT_SCALES = 4
_EPS = 1e-3


class DepthBins(nn.Module):
    """Logits [b, bins, h, w] -> depth [b, 1, h, w] in metres, between `min_depth` and `max_depth`."""

    centres: Tensor

    def __init__(self, bins: int, *, min_depth: float, max_depth: float, spacing: Literal["uniform", "log"]):
        super().__init__()
        if spacing == "uniform":
            centres = torch.linspace(min_depth, max_depth, bins)
        else:
            centres = torch.logspace(torch.tensor(min_depth).log10(), torch.tensor(max_depth).log10(), bins)
        self.register_buffer("centres", centres, persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        weights = logits.float().relu() + 0.1  # linear normalization: DINOv2's
        weights = weights / weights.sum(dim=1, keepdim=True)
        with torch.autocast(logits.device.type, enabled=False):  # bf16 resolves 1 part in 256
            return torch.einsum("bkhw,k->bhw", weights, self.centres)[:, None]


def silog(predicted: Tensor, truth: Tensor, known: Tensor, *, variance_focus: float) -> Tensor:
    """sqrt(mean of d^2 - lambda (mean of d)^2) of each map, d the difference of logs, averaged over [b, h, w] maps.

    Args:
        known: bool [b, h, w]; a map that is unknown everywhere counts as 0.
        variance_focus: lambda; 1: the scale has no influence.
    """
    gap = torch.where(known, predicted.clamp(min=1e-6).log() - truth.clamp(min=1e-6).log(), 0.0)
    count = known.sum(dim=(1, 2)).clamp(min=1)
    mean, square = gap.sum(dim=(1, 2)) / count, gap.square().sum(dim=(1, 2)) / count
    return (square - variance_focus * mean.square() + _EPS**2).sqrt().sub(_EPS).mean()


def gradient_loss(predicted: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """Mean absolute gradient of the difference of logs, at 4 scales, each half the previous one; [b, h, w] maps."""
    gap = predicted.clamp(min=1e-6).log() - truth.clamp(min=1e-6).log()
    total = gap.new_zeros(())
    for scale in range(GRADIENT_SCALES):
        step = 2**scale
        d, m = gap[:, ::step, ::step], known[:, ::step, ::step]
        both_x, both_y = m[:, :, 1:] & m[:, :, :-1], m[:, 1:] & m[:, :-1]
        across = torch.where(both_x, (d[:, :, 1:] - d[:, :, :-1]).abs(), 0.0).sum(dim=(1, 2))
        down = torch.where(both_y, (d[:, 1:] - d[:, :-1]).abs(), 0.0).sum(dim=(1, 2))
        total = total + ((across + down) / m.sum(dim=(1, 2)).clamp(min=1)).mean()
    return total
