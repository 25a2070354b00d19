"""The EM attention unit (Li et al. 2019, "Expectation-Maximization Attention Networks for Semantic Segmentation")."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.losses.center import PendingMean
from pretrain.models.mechanisms.contract import MapMechanism
from pretrain.models.mechanisms.spatial.places import Norm, place_norm, pointwise

EPS = 1e-6


class EMAttention(MapMechanism):
    """relu(x + norm(W2 relu(mu z^T))): the map rebuilt from k bases mu, which EM fits to the image (section 4.2).

    An iteration, without gradient: z = softmax over the bases of y^T mu (eq. 11); z_ = z / sum of z over the places;
    mu = y z_ of unit length (eq. 12, section 4.3). y = W1 x; as everything that reads y is without gradient, W1 stays
    what it was drawn as, and is frozen here.

    The initial bases are a buffer: bases <- momentum * bases + (1 - momentum) * mean of mu over the images of the step
    and of all ranks, in `after_step` (section 4.4). It is no identity at the start. It reads a set of places.

    Args:
        dim: C. num_bases: k. bn_momentum: of the batch statistics; the paper's 3e-4 needs about 10 000 steps until they
            forget their initial values.
    """

    averaged = ("bases",)

    bases: Tensor

    def __init__(
        self,
        dim: int,
        *,
        num_bases: int = 64,
        iterations: int = 3,
        momentum: float = 0.9,
        norm: Norm = "batch",
        bn_momentum: float = 0.1,
    ):
        super().__init__()
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {iterations}")
        self.iterations, self.momentum = iterations, momentum
        self.proj_in = pointwise(dim, dim).requires_grad_(False)
        self.proj = pointwise(dim, dim, bias=False)
        self.norm = place_norm(norm, dim, bn_momentum)
        for layer in (self.proj_in, self.proj):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
        self.register_buffer("bases", F.normalize(torch.randn(1, dim, num_bases), dim=1))
        self._pending = PendingMean()

    def forward(self, x: Tensor) -> Tensor:
        mu, z = self.fit(x)
        if self.training and torch.is_grad_enabled():
            self._pending.add(mu.sum(0).flatten(), rows=len(mu))
        out = F.relu(torch.bmm(mu, z.transpose(1, 2)))
        return F.relu(x + self.norm(self.proj(out)).view_as(x))

    @torch.no_grad()
    def fit(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Bases mu [b, C, k] of each image after the last iteration, and z [b, places, k] before its last M step."""
        with torch.autocast(x.device.type, enabled=False):
            y = self.proj_in(x.flatten(2).float())
            mu, z = _iterate(y, self.bases.expand(y.shape[0], -1, -1))
            for _ in range(self.iterations - 1):
                mu, z = _iterate(y, mu)
        return mu, z

    @torch.no_grad()
    def after_step(self) -> None:
        self._pending.move(self.bases.view(1, -1), self.momentum)

    def discard_pending(self) -> None:
        self._pending.discard()


def _iterate(y: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
    """The next bases, and the z that they come from."""
    z = torch.bmm(y.transpose(1, 2), mu).softmax(dim=2)
    mu = torch.bmm(y, z / (EPS + z.sum(1, keepdim=True)))
    return mu / (EPS + mu.norm(dim=1, keepdim=True)), z
