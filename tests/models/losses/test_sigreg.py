from __future__ import annotations

import math

import pytest
import torch

from pretrain.models.losses.sigreg import draw_directions, quadrature, sigreg
from tests.models.losses.peak_memory import peak_bytes


def normal(rows: int, dim: int) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_statistic_is_the_distance_of_characteristic_functions():
    rows, directions = normal(5, 3), draw_directions(3, 4, step=0)
    t, _, _ = quadrature(3.0, 17)
    x = rows @ directions.double()
    for k, found in enumerate(sigreg(rows, directions)):
        gaps = []
        for point in t.tolist():
            normal_one, mean = math.exp(-point * point / 2), torch.exp(1j * point * x[:, k]).mean()
            gaps.append(normal_one * float((mean - normal_one).abs()) ** 2)
        both_signs = 2 * torch.trapezoid(torch.tensor(gaps), t.double())
        torch.testing.assert_close(found, 5 * both_signs, atol=1e-6, rtol=1e-6)


def test_the_gradient_is_that_of_finite_differences():
    directions = draw_directions(3, 4, step=1).double()
    rows = normal(2 * 5, 3).reshape(2, 5, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda given: sigreg(given, directions, num_points=5), rows)


def test_it_is_small_for_a_normal_sample_and_grows_with_shift_scale_and_collapse():
    rows, directions = normal(400, 6), draw_directions(6, 64, step=0)
    fits = sigreg(rows, directions).mean()
    for worse in (rows + 1, 3 * rows, rows / 3, rows * torch.tensor([1.0, 1, 1, 1, 1, 0])):
        assert sigreg(worse, directions).mean() > 5 * fits
    assert fits < 1.5, "its mean for a normal sample is about 0.9"


def test_directions_are_unit_vectors_and_new_at_every_step():
    first, again, other = (draw_directions(8, 5, step=step) for step in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.testing.assert_close(first.norm(dim=0), torch.ones(5))


def test_small_statistics_are_clipped_without_gradient():
    rows = normal(6, 3).requires_grad_()
    directions = draw_directions(3, 8, step=0)
    plain = sigreg(rows, directions).detach()
    limit = float(plain.median())
    clipped = sigreg(rows, directions, clip=limit)
    assert torch.equal(clipped, torch.where(plain >= limit, plain, 0.0))
    (gradient,) = torch.autograd.grad(clipped[plain < limit].sum(), rows)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("points", [5, 65])
def test_memory_does_not_grow_with_the_points_of_the_integral(points: int):
    rows, directions = torch.randn(256, 16, requires_grad=True), draw_directions(16, 512, step=0)
    table = 4 * 256 * 512
    assert peak_bytes(lambda: sigreg(rows, directions, num_points=points).mean().backward()) < 7 * table
