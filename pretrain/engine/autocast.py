"""The precision in which a model computes, the same in every engine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.core.configlib import Precision
from pretrain.core.precision import autocast
from pretrain.core.trainable import Batch


class Autocast(nn.Module):
    """Wraps the model for an engine: fp32 parameters, computation in the configured precision.

    Both engines use this autocast, so that they compute the same; gradients are averaged in fp32.
    """

    def __init__(self, trainable: nn.Module, precision: Precision, device: torch.device, *, cache: bool = True):
        super().__init__()
        self.trainable = trainable
        self._precision: Precision = precision
        self._device, self._cache = device, cache

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        with autocast(self._device, self._precision, cache=self._cache):
            return self.trainable(batch, step)
