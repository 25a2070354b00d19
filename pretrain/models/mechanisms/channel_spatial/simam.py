"""SimAM: a gate from how far a value is from the mean of its channel, without parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.models.mechanisms.contract import MapMechanism


class SimAM(MapMechanism):
    """x * s(d / (4 (v + l)) + 1/2), d = (x - mean)^2 and v = sum(d) / (N - 1) per channel of a map of N places.

    Yang et al. 2021, eq. 5 and 6. Reads a set. It has no parameters; at a place with d = v the gate is 0.68, at the
    mean 0.62. The statistics are computed in fp32 at least.

    Args:
        dim: channels, not used. stabilizer: l.
    """

    def __init__(self, dim: int, *, stabilizer: float = 1e-4):
        super().__init__()
        del dim
        self.stabilizer = stabilizer

    def forward(self, x: Tensor) -> Tensor:
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = (values - values.mean((2, 3), keepdim=True)).square()
        places = x.shape[2] * x.shape[3]
        variance = squares.sum((2, 3), keepdim=True) / max(places - 1, 1)
        return x * (squares / (4 * (variance + self.stabilizer)) + 0.5).sigmoid().to(x.dtype)
