"""Non-local block: every place reads every place (Wang et al. 2018, "Non-local Neural Networks", eq. 1 to 6)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.mechanisms.contract import MapMechanism
from pretrain.models.mechanisms.spatial.places import Norm, place_norm, pointwise

Similarity = Literal["embedded_gaussian", "gaussian", "dot_product", "concatenation"]
_POOL = {1: (F.max_pool1d, 2), 2: (F.max_pool2d, 2), 3: (F.max_pool3d, (1, 2, 2))}


class NonLocal(MapMechanism):
    """x + norm(W y), y_i = sum_j f(x_i, x_j) g(x_j) / C(x), for maps [b, C, *places] of one to three dimensions.

    f / C by `similarity` (section 3.2), theta, phi and g linear to `inner_dim` channels:
      * embedded_gaussian: softmax_j(theta_i . phi_j), without a scale by the width;
      * gaussian: softmax_j(x_i . x_j);
      * dot_product: theta_i . phi_j / number of j;
      * concatenation: relu(w . [theta_i, phi_j]) / number of j.

    It starts as the identity: scale and shift of the norm are 0, without a norm those of W. `sub_sample` takes the
    maximum of phi and g over 2 x 2 places, not over time (section 3.3): then it reads the grid, else a set.
    timm's `NonLocalAttn` with `use_scale=False` computes the embedded Gaussian without sub-sampling.

    Args:
        dim: C. inner_dim: None: C / 2. norm: None: none after W.
    """

    starts_as_identity = True

    def __init__(
        self,
        dim: int,
        *,
        inner_dim: int | None = None,
        similarity: Similarity = "embedded_gaussian",
        sub_sample: bool = False,
        norm: Norm | None = "batch",
    ):
        super().__init__()
        if similarity not in get_args(Similarity):
            raise ValueError(f"similarity {similarity!r}: expected one of {', '.join(get_args(Similarity))}")
        inner = max(dim // 2, 1) if inner_dim is None else inner_dim
        self.similarity, self.sub_sample = similarity, sub_sample
        embeds = similarity != "gaussian"
        self.theta = pointwise(dim, inner) if embeds else nn.Identity()
        self.phi = pointwise(dim, inner) if embeds else nn.Identity()
        self.g = pointwise(dim, inner)
        self.pair = pointwise(2 * inner, 1, bias=False) if similarity == "concatenation" else None
        self.proj = pointwise(inner, dim)
        self.norm = nn.Identity() if norm is None else place_norm(norm, dim)
        for parameter in (self.proj if norm is None else self.norm).parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        weights, g = self.weights(x), self._keys(self.g, x)
        out = torch.bmm(g.to(weights.dtype), weights.transpose(1, 2))
        return x + self.norm(self.proj(out)).view_as(x)

    def weights(self, x: Tensor) -> Tensor:
        """How much each place reads of each key: [b, places, keys]; keys are the places, or what sub-sampling left."""
        theta, phi = self.theta(x.flatten(2)), self._keys(self.phi, x)
        if self.pair is not None:
            of_theta, of_phi = self.pair.weight.chunk(2, dim=1)
            pairs = F.conv1d(theta, of_theta).transpose(1, 2) + F.conv1d(phi, of_phi)
            return F.relu(pairs) / phi.shape[2]
        scores = torch.bmm(theta.transpose(1, 2), phi)
        return scores / phi.shape[2] if self.similarity == "dot_product" else scores.softmax(dim=2)

    def check_grid(self, grid: tuple[int, int]) -> None:
        if self.sub_sample and min(grid) < 2:
            raise ValueError(f"sub_sample takes 2 x 2 places together: {grid[0]} x {grid[1]} have too few")

    def _keys(self, layer: nn.Module, x: Tensor) -> Tensor:
        """`layer` of the places that are read, [b, C, keys]."""
        flat = layer(x.flatten(2))
        if not self.sub_sample:
            return flat
        pool, size = _POOL[x.dim() - 2]
        return pool(flat.unflatten(2, x.shape[2:]), size).flatten(2)
