"""Matrix decompositions X ~ D C of Hamburger (Geng et al. 2021, "Is Attention Better Than Matrix Decomposition?", 3).

X [n, d, m] holds m vectors of d numbers, D [n, d, R] the bases, C the coefficients, here as [n, m, R]. The iterations
are without gradient; the last coefficients, computed from X and the final bases, have the only one ("one-step
gradient", section 3.3).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6

Factorization = Literal["nmf", "cd", "vq"]


class Decomposition:
    """How bases are drawn, iterated, and read.

    Args:
        sharpness: factor of the cosines inside a softmax (1 / temperature). ridge: of the least squares of CD.
    """

    nonnegative = False  # whether X must be

    def __init__(self, *, sharpness: float = 1.0, ridge: float = 0.1):
        self.sharpness, self.ridge = sharpness, ridge

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Random initial bases [..., d, R], of unit length over d."""
        return F.normalize(torch.randn(shape, generator=generator, device="cpu"), dim=-2)

    @torch.no_grad()
    def fit(self, x: Tensor, bases: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """The bases after `steps` iterations, and the coefficients that belong to them."""
        raise NotImplementedError

    def coefficients(self, x: Tensor, bases: Tensor, coefficients: Tensor) -> Tensor:
        """The last coefficients [n, m, R], with the gradient of x."""
        raise NotImplementedError


class NMF(Decomposition):
    """Non-negative matrix factorization by multiplicative updates (Lee & Seung 1999; algorithm 2 of the paper)."""

    nonnegative = True

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return F.normalize(torch.rand(shape, generator=generator, device="cpu"), dim=-2)

    @torch.no_grad()
    def fit(self, x: Tensor, bases: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        coefficients = torch.bmm(x.transpose(1, 2), bases).softmax(dim=-1)
        for _ in range(steps):
            coefficients = self.coefficients(x, bases, coefficients)
            of_others = torch.bmm(bases, torch.bmm(coefficients.transpose(1, 2), coefficients))
            bases = bases * torch.bmm(x, coefficients) / (of_others + EPS)
        return bases, coefficients

    def coefficients(self, x: Tensor, bases: Tensor, coefficients: Tensor) -> Tensor:
        of_others = torch.bmm(coefficients, torch.bmm(bases.transpose(1, 2), bases))
        return coefficients * torch.bmm(x.transpose(1, 2), bases) / (of_others + EPS)


class VQ(Decomposition):
    """Soft vector quantization: bases are means of the vectors, weighted by a softmax of cosines.

    The length of a vector in its cosine counts as a constant: it has no gradient.
    """

    @torch.no_grad()
    def fit(self, x: Tensor, bases: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        shares = self.nearest(x, bases)
        for step in range(steps):
            shares = self.nearest(x, bases) if step else shares
            bases = self.means(x, shares / (EPS + shares.sum(1, keepdim=True)))
        return bases, shares

    def means(self, x: Tensor, weights: Tensor) -> Tensor:
        """New bases [n, d, R]; weights [n, m, R] sum to 1 over the vectors."""
        return torch.bmm(x, weights)

    def nearest(self, x: Tensor, bases: Tensor) -> Tensor:
        """Softmax over the bases, [n, m, R], of the cosines of vectors and bases."""
        unit = x / (EPS + x.detach().norm(dim=1, keepdim=True))
        cosines = torch.bmm(unit.transpose(1, 2), F.normalize(bases, dim=1, eps=EPS))
        return (self.sharpness * cosines).softmax(dim=-1)

    def coefficients(self, x: Tensor, bases: Tensor, coefficients: Tensor) -> Tensor:
        del coefficients
        return self.nearest(x, bases)


class CD(VQ):
    """Concept decomposition: the means of VQ at unit length, and the coefficients of a ridge regression (Dhillon and
    Modha 2001)."""

    def means(self, x: Tensor, weights: Tensor) -> Tensor:
        return F.normalize(super().means(x, weights), dim=1, eps=EPS)

    def coefficients(self, x: Tensor, bases: Tensor, coefficients: Tensor) -> Tensor:
        del coefficients
        gram = torch.bmm(bases.transpose(1, 2), bases)
        gram = gram + self.ridge * torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
        inverse = _inverse_by_products(gram) if torch.compiler.is_exporting() else torch.linalg.inv(gram)
        return torch.bmm(torch.bmm(x.transpose(1, 2), bases), inverse)


def _inverse_by_products(matrix: Tensor, iterations: int = 30) -> Tensor:
    """The inverse of positive definite matrices [n, R, R] by Newton's iteration: ONNX has no inverse."""
    eye = torch.eye(matrix.shape[-1], device=matrix.device, dtype=matrix.dtype)
    inverse = eye / matrix.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    for _ in range(iterations):
        inverse = torch.bmm(inverse, 2 * eye - torch.bmm(matrix, inverse))
    return inverse


FACTORIZATIONS: dict[Factorization, type[Decomposition]] = {"nmf": NMF, "cd": CD, "vq": VQ}
