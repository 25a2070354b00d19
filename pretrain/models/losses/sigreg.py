"""SIGReg: how far the rows of a batch are from N(0, I), by a test of normality along random directions.

Balestriero & LeCun 2025, "LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics", section 4;
the test is that of Epps & Pulley 1983: the distance between the empirical characteristic function and exp(-t^2 / 2).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.core import distributed


def draw_directions(dim: int, count: int, *, step: int, device: torch.device | str = "cpu") -> Tensor:
    """Random unit vectors, the columns of fp32 [dim, count]: a function of the step, on every rank the same."""
    normal = torch.randn(dim, count, generator=torch.Generator().manual_seed(step))
    return (normal / normal.norm(dim=0)).to(device)


def sigreg(rows: Tensor, directions: Tensor, *, t_max: float = 3.0, num_points: int = 17, clip: float = 0.0) -> Tensor:
    """The statistic of each of the `directions` [D, K], fp32 [..., K], of `rows` [..., n, D] over all ranks.

    n * world size * the integral over t of exp(-t^2 / 2) |mean exp(i t x) - exp(-t^2 / 2)|^2, x = rows @ directions, by
    the trapezoidal rule. The mean is over the rows of all ranks, each of which must have n; with gradients averaged
    over ranks, value and gradient are those of one process with all rows. Memory is that of x, for any `num_points`.

    Args:
        t_max, num_points: the points of the rule are evenly spaced in [0, t_max]. clip: smaller statistics become 0.
    """
    with torch.autocast(rows.device.type, enabled=False):
        rows = rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows
        t, phi, weights = (points.to(rows) for points in quadrature(t_max, num_points))
        local = cast(Tensor, _Characteristic.apply(rows @ directions.to(rows), t))
        cosine, sine = distributed.sum_over_ranks(local) / distributed.world_size()
        error = (cosine - phi).square() + sine.square()
        statistic = (error @ weights) * (rows.shape[-2] * distributed.world_size())
        return torch.where(statistic >= clip, statistic, 0.0)


def quadrature(t_max: float, num_points: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points t in [0, t_max], exp(-t^2 / 2), and the weights of the trapezoidal rule times it, fp32 [num_points] each.

    The rule is that of [-t_max, t_max]: the integrand is even, so each t > 0 also counts for -t.
    """
    t = torch.linspace(0, t_max, num_points)
    spacing = t_max / (num_points - 1)
    phi = (-t.square() / 2).exp()
    weights = torch.full_like(t, 2 * spacing)
    weights[0] = weights[-1] = spacing
    return t, phi, weights * phi


class _Characteristic(torch.autograd.Function):
    """The means over n of cos(t x) and sin(t x), x [..., n, K] -> [2, ..., K, T]: one point t at a time, so that no
    table of n * K * T numbers is ever held."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, t)
        angles = (point * x for point in t)
        return torch.stack([torch.stack([a.cos().mean(-2), a.sin().mean(-2)]) for a in angles], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, t = ctx.saved_tensors
        of_x = torch.zeros_like(x)
        for index, point in enumerate(t):
            cosine, sine = gradient[..., index].unsqueeze(-2) * (point / x.shape[-2])
            angle = point * x
            of_x += sine * angle.cos() - cosine * angle.sin()
        return of_x, None
