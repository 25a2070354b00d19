"""The channel attention of DANet: every channel reads all others, by how unlike their maps are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.models.mechanisms.contract import MapMechanism


class ChannelMap(MapMechanism):
    """gamma * softmax(max(E) - E) X + x with E = X X^T over the places, per pair of channels (Fu et al. 2019, 3.3).

    The paper's formula has softmax(E); the authors' networks subtract E from its largest value per row, so a channel
    reads the most unlike ones. Reads a set. At the start an identity: gamma is 0.

    Args:
        dim: channels, not used: there are no projections.
        per_place: divide E by the number of places, so that it does not grow with the image or with the tokens that
            are kept. The authors' networks do not, and their softmax saturates.
    """

    starts_as_identity = True

    def __init__(self, dim: int, *, per_place: bool = False):
        super().__init__()
        del dim
        self.per_place = per_place
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # sums over all places: not in 16 bits
            rows = x.flatten(2).to(torch.promote_types(x.dtype, torch.float32))
            energy = rows @ rows.transpose(1, 2)
            if self.per_place:
                energy = energy / rows.shape[2]
            read = ((-energy).softmax(dim=-1) @ rows).unflatten(2, x.shape[2:])  # softmax ignores what a row shares
        return x + (self.gamma * read).to(x.dtype)
