"""External attention (Guo et al. 2021, "Beyond Self-attention: External Attention using Two Linear Layers")."""

from __future__ import annotations

from torch import Tensor, nn

from pretrain.models.mechanisms.contract import MapMechanism
from pretrain.models.mechanisms.spatial.places import Norm, place_norm, pointwise

EPS = 1e-9


class ExternalAttention(MapMechanism):
    """relu(x + norm(W2 M_v a)), a = softmax over the places of M_k W1 x, then divided by its sum over the slots.

    The two memories are weights, shared by all images (eq. 5 and 6, section 3.2). The paper's one memory for both is
    not offered: two gradients would meet in one storage. It is no identity at the start. It reads a set of places; the
    softmax over them makes its value depend on how many there are.

    Args:
        dim: C. num_slots: rows of each memory.
    """

    def __init__(self, dim: int, *, num_slots: int = 64, norm: Norm = "batch"):
        super().__init__()
        self.proj_in = pointwise(dim, dim)
        self.memory_keys = pointwise(dim, num_slots, bias=False)
        self.memory_values = pointwise(num_slots, dim, bias=False)
        self.proj = pointwise(dim, dim, bias=False)
        self.norm = place_norm(norm, dim)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.memory_keys(self.proj_in(x.flatten(2)))
        weights = scores.float().softmax(dim=2)
        weights = weights / (EPS + weights.sum(1, keepdim=True))
        out = self.norm(self.proj(self.memory_values(weights.to(scores.dtype))))
        return nn.functional.relu(x + out.view_as(x))
