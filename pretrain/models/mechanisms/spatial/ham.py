"""The ham of Hamburger: a map replaced by its low-rank approximation, and where the initial bases come from."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.losses.center import PendingMean
from pretrain.models.mechanisms.spatial.decomposition import FACTORIZATIONS, Factorization

Vectors = Literal["places", "channels"]
_SEED = 2021  # of evaluation, and of the first step
_MOST_PLACES = 4096  # beyond them, random bases of channels repeat


class Ham(nn.Module):
    """A map [b, C, N] -> bases times coefficients, [b, C, N], in fp32.

    The vectors that share the bases are the places, of C / splits numbers each, or the channels, of N numbers each.

    Initial bases:
      * random (the paper): drawn for every step anew, from a generator that the number of the step seeds; all images of
        a step share the draw, so that neither accumulation nor the number of ranks changes a result. Evaluation uses
        one fixed draw: two passes over an image agree.
      * running: a buffer; bases <- (1 - eta) * bases + eta * mean of the fitted bases, of unit length, over the images
        of a step and all ranks, in `after_step`.

    Args:
        dim: C. num_bases: R. splits: groups of channels that are decomposed on their own.
        places: N, which running bases of channels need.
    """

    bases: Tensor
    steps_taken: Tensor

    def __init__(
        self,
        dim: int,
        *,
        num_bases: int = 64,
        factorization: Factorization = "nmf",
        vectors: Vectors = "places",
        splits: int = 1,
        train_iterations: int = 6,
        eval_iterations: int = 7,
        sharpness: float = 1.0,
        ridge: float = 0.1,
        random_bases: bool = True,
        eta: float = 0.9,
        places: int | None = None,
    ):
        super().__init__()
        if factorization not in FACTORIZATIONS:
            raise ValueError(f"factorization {factorization!r}: expected one of {', '.join(FACTORIZATIONS)}")
        if vectors not in ("places", "channels"):
            raise ValueError(f"vectors {vectors!r}: expected places or channels")
        if dim % splits:
            raise ValueError(f"splits={splits} must divide the {dim} channels")
        if vectors == "channels" and not random_bases and places is None:
            raise ValueError("running bases of channels belong to one number of places: give `places`")
        self.dim, self.num_bases, self.splits, self.vectors, self.eta = dim, num_bases, splits, vectors, eta
        self.train_iterations, self.eval_iterations = train_iterations, eval_iterations
        self.decomposition = FACTORIZATIONS[factorization](sharpness=sharpness, ridge=ridge)
        self.random_bases = random_bases
        self.averaged = () if random_bases else ("bases",)
        places = _MOST_PLACES if random_bases or places is None else places
        self.length = dim // splits if vectors == "places" else places
        self.register_buffer("bases", self.draw(0), persistent=not random_bases)
        if random_bases:
            self.register_buffer("steps_taken", torch.zeros((), dtype=torch.int64))
        self._pending = PendingMean()

    def forward(self, x: Tensor, bases: Tensor | None = None) -> Tensor:
        """Maps [b, C, N] -> their approximation.

        `bases`: initial ones [b * splits, length, R] in place of the own.
        """
        with torch.autocast(x.device.type, enabled=False):
            vectors = x.float().reshape(x.shape[0] * self.splits, self.dim // self.splits, -1)
            vectors = vectors if self.vectors == "places" else vectors.transpose(1, 2)
            if bases is None:
                bases = self._initial(vectors.shape[1], x.device).repeat(x.shape[0], 1, 1)
            steps = self.train_iterations if self.training else self.eval_iterations
            bases, coefficients = self.decomposition.fit(vectors, bases, steps)
            if self.training and torch.is_grad_enabled() and not self.random_bases:
                self._pending.add(bases.view(len(x), -1).sum(0), rows=len(x))
            out = torch.bmm(bases, self.decomposition.coefficients(vectors, bases, coefficients).transpose(1, 2))
            return (out if self.vectors == "places" else out.transpose(1, 2)).reshape(x.shape)

    def draw(self, step: int) -> Tensor:
        """The random bases [splits, length, R] of a step; step 0 is evaluation."""
        generator = torch.Generator().manual_seed(_SEED + step)
        return self.decomposition.draw((self.splits, self.length, self.num_bases), generator)

    def check_places(self, count: int) -> None:
        """Raises ValueError if its running bases belong to another number of places."""
        if self.vectors == "channels" and not self.random_bases and count != self.length:
            raise ValueError(f"running bases of channels are of {self.length} places, the map has {count}")

    @torch.no_grad()
    def after_step(self) -> None:
        if self.random_bases:
            self.steps_taken += 1
            return
        flat = self.bases.view(1, -1)
        self._pending.move(flat, 1 - self.eta)
        self.bases.copy_(F.normalize(self.bases, dim=1))

    def discard_pending(self) -> None:
        self._pending.discard()

    def _initial(self, length: int, device: torch.device) -> Tensor:
        """The bases to start from, [splits, length, R]."""
        if not self.random_bases:
            self.check_places(length)
            return self.bases
        bases = self.draw(int(self.steps_taken) + 1).to(device) if self.training else self.bases
        if self.vectors == "places":
            return bases
        return F.normalize(bases[:, torch.arange(length, device=device) % self.length], dim=1)
