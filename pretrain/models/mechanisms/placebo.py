"""A control for mechanisms: each image is changed by what the mechanism computes from another one.

Weights, cost and start are those of the mechanism, but it does not see the image that it changes. A gain that the
placebo has too does not come from attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.models.layers.mixer import EVERY_TOKEN, Bias, Layout, Mixer

TINY = 1e-6  # the factor of a smaller value is taken as 1


def factors(x: Tensor, scaled: Tensor) -> Tensor:
    """What a gate multiplied x by, [b, C, H, W] in fp32; 1 where x is 0."""
    nonzero = x.abs() > TINY
    return torch.where(nonzero, scaled.float() / torch.where(nonzero, x, torch.ones_like(x)).float(), 1.0)


def of_next(values: Tensor) -> Tensor:
    """Image i gets the values of image i + 1 of the batch, the last one those of the first."""
    return values.roll(-1, 0)


class NextImage(Mixer):
    """A mixer whose output is that of the next image."""

    def __init__(self, mixer: Mixer):
        super().__init__()
        self.mixer = mixer

    def forward(
        self,
        x: Tensor,
        queries: slice = EVERY_TOKEN,
        bias: Bias | None = None,
        rotation: Tensor | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        return of_next(self.mixer(x, queries, bias, rotation, layout))
