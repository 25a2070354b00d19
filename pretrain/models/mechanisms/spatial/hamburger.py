"""Hamburger: linear layer, matrix decomposition, linear layer (Geng et al. 2021, "Is Attention Better Than Matrix
Decomposition?", section 3.1)."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.mechanisms.contract import MapMechanism
from pretrain.models.mechanisms.spatial.ham import Ham
from pretrain.models.mechanisms.spatial.places import Norm, place_norm, pointwise

Version = Literal["v1", "v2", "v2+"]


class Hamburger(MapMechanism):
    """relu(a x + c upper(cheese(ham(lower(x))))): the map is replaced by a low-rank approximation of itself.

    lower: linear to `inner_dim`, then a ReLU for NMF. cheese: linear, norm, ReLU. upper: linear. The versions of the
    paper's authors: v1 has no cheese and a norm after upper; v2 has cheese and no norm; v2+ has learned a and c, which
    start at 1 and at 0, and with `dual` two hams, one of places and one of channels, each with `inner_dim` channels.
    a = c = 1 in the others. v2+ starts as relu(x), the others as no identity.

    It reads a set of places; hams of channels with random bases read a grid. Where the bases come from: `Ham`.

    Args:
        dim: C. cheese: False leaves it out of v2 and v2+. cheese_dim: its channels; None: `inner_dim`.
        zero_start: False: c starts at 1. bn_momentum: of the batch statistics; the authors' 3e-4 needs about 10 000
            steps until they forget their initial values.
        **of_ham: `num_bases`, `factorization`, `vectors`, `splits`, ... of `Ham`.
    """

    def __init__(
        self,
        dim: int,
        *,
        inner_dim: int = 512,
        version: Version = "v1",
        dual: bool = False,
        cheese: bool = True,
        cheese_dim: int | None = None,
        zero_start: bool = True,
        norm: Norm = "batch",
        bn_momentum: float = 0.1,
        **of_ham: Any,
    ):
        super().__init__()
        if version not in ("v1", "v2", "v2+"):
            raise ValueError(f"version {version!r}: expected v1, v2 or v2+")
        if dual and version != "v2+":
            raise ValueError(f"dual=True is an option of v2+, not of {version}")
        kinds = ("places", "channels") if dual else (of_ham.pop("vectors", "places"),)
        self.hams = nn.ModuleList(Ham(inner_dim, **of_ham, vectors=vectors) for vectors in kinds)
        width = len(kinds) * inner_dim
        self.lower = pointwise(dim, width)
        self.nonnegative = of_ham.get("factorization", "nmf") == "nmf"
        self.cheese = nn.Identity()
        if version != "v1" and cheese:
            out = inner_dim if cheese_dim is None else cheese_dim
            layers = (pointwise(width, out, bias=False), place_norm(norm, out, bn_momentum), nn.ReLU())
            self.cheese, width = nn.Sequential(*layers), out
        self.proj = pointwise(width, dim, bias=False)
        self.norm = place_norm(norm, dim, bn_momentum) if version == "v1" else nn.Identity()
        self.learned_scales = version == "v2+"
        if self.learned_scales:
            self.scale_shortcut = nn.Parameter(torch.ones(1))
            self.scale_ham = nn.Parameter(torch.zeros(1) if zero_start else torch.ones(1))

    def forward(self, x: Tensor, bases: list[Tensor] | None = None) -> Tensor:
        """Maps [b, C, H, W] -> maps. `bases`: initial ones of each ham in place of its own."""
        y = self.lower(x.flatten(2))
        y = F.relu(y) if self.nonnegative else y
        given = [None] * len(self.hams) if bases is None else bases
        parts = y.chunk(len(self.hams), dim=1)
        y = torch.cat([ham(part, of) for ham, part, of in zip(self.hams, parts, given, strict=True)], dim=1)
        y = self.norm(self.proj(self.cheese(y))).view_as(x)
        return F.relu(self.scale_shortcut * x + self.scale_ham * y if self.learned_scales else x + y)

    def check_grid(self, grid: tuple[int, int]) -> None:
        for ham in self.hams:
            ham.check_places(grid[0] * grid[1])  # type: ignore[operator]

    def after_step(self) -> None:
        for ham in self.hams:
            ham.after_step()  # type: ignore[operator]

    def discard_pending(self) -> None:
        for ham in self.hams:
            ham.discard_pending()  # type: ignore[operator]
