"""Between backward and update, one small all-reduce of losses, gradient norms, finiteness and requests of all ranks.

A gradient is either partitioned over ranks (ZeRO) or complete on each (DDP); in the latter case only the norms of
rank 0 are used, so that every rank clips by the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import (
    Tensor,
    _foreach_mul_,  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
    _foreach_norm,  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
)

from pretrain.core import distributed
from pretrain.engine.config import ClipMode
from pretrain.engine.optim.fragments import Fragment

_EPS = 1e-6
_NON_FINITE = 1
_REQUESTS = 2  # requests start at this bit


@dataclass(frozen=True)
class ClipDecision:
    """The same on every rank.

    Attributes:
        losses: means over ranks.
        norms: of each parameter's unscaled gradient, by name.
        bad_ranks: ranks with a non-finite loss. requests: bits requested by any rank.
        waits: seconds that each rank waited for data. works: seconds of its forward passes, see `decide`.
    """

    losses: dict[str, float]
    norms: dict[str, float]
    bad_ranks: tuple[int, ...]
    requests: int
    waits: tuple[float, ...]
    works: tuple[float, ...]

    @property
    def grad_norm(self) -> float:
        return math.sqrt(sum(norm * norm for norm in self.norms.values()))

    @property
    def first_bad(self) -> str:
        """The first loss, or the first parameter with a gradient, that is not finite."""
        values = {**self.losses, **self.norms}
        return next((name for name, value in values.items() if not math.isfinite(value)), "gradient norm")


def decide(
    losses: Mapping[str, Tensor],
    loss_is_finite: Tensor,
    gradients: Sequence[tuple[Fragment, Tensor]],
    *,
    names: Sequence[str],
    owned: bool,
    scale: float,
    requests: int,
    wait: float,
    work: float,
    device: torch.device,
) -> ClipDecision:
    """Reduce the values of all ranks with one collective and one device synchronization.

    Args:
        losses: means of this rank. loss_is_finite: bool scalar, over all micro-batches of this rank.
        gradients: of this rank, multiplied by `scale`. owned: add them to the norms (false on DDP ranks above 0).
        names: all trained parameters, in the same order on each rank.
        wait, work: seconds that this rank waited for data, and of its latest measured forward passes.
    """
    rank, world = distributed.rank(), distributed.world_size()
    codes = torch.zeros(world, dtype=torch.float64, device=device)
    codes[rank] = _NON_FINITE * (~loss_is_finite).to(torch.float64) + _REQUESTS * requests
    times = torch.zeros(2, world, dtype=torch.float64)
    times[:, rank] = torch.tensor([wait, work])
    means = torch.stack([value.to(device=device, dtype=torch.float64) for value in losses.values()]) / world
    squares = torch.zeros(len(names), dtype=torch.float64, device=device)
    if owned and gradients:
        index = {name: at for at, name in enumerate(names)}
        norms = torch.stack(_foreach_norm([gradient for _, gradient in gradients])).to(device, torch.float64)
        places = torch.tensor([index[fragment.name] for fragment, _ in gradients], device=device)
        squares.index_add_(0, places, (norms / scale).square())
    reduced = distributed.all_reduce_sum(torch.cat([codes, times.to(device).view(-1), means, squares]))
    total: list[float] = cast(Any, reduced).tolist()
    rank_codes = [int(code) for code in total[:world]]
    cut = 3 * world + len(means)
    agreed = 0
    for code in rank_codes:
        agreed |= code // _REQUESTS
    return ClipDecision(
        losses=dict(zip(losses, total[3 * world : cut], strict=True)),
        norms={name: math.sqrt(square) for name, square in zip(names, total[cut:], strict=True)},
        bad_ranks=tuple(at for at, code in enumerate(rank_codes) if code & _NON_FINITE),
        requests=agreed,
        waits=tuple(total[world : 2 * world]),
        works=tuple(total[2 * world : 3 * world]),
    )


def clip_coefficients(
    norms: Mapping[str, float], *, mode: ClipMode, limit: float | None, modules: Mapping[str, str] | None = None
) -> dict[str, float]:
    """The factor for the gradient of each parameter, at most 1.

    Args:
        mode: "global" clips the norm over all gradients, "per_tensor" that of each parameter (official code of Caron
            et al. 2021), "per_module" that of each module (Oquab et al. 2023).
        limit: maximum norm; None: no clipping.
        modules: the module of each name, for mode "per_module".
    """
    if limit is None:
        return dict.fromkeys(norms, 1.0)
    if mode == "global":
        together = dict.fromkeys(norms, "")
    elif mode == "per_tensor":
        together = {name: name for name in norms}
    else:
        assert modules is not None
        together = {name: modules[name] for name in norms}
    squares = dict.fromkeys(together.values(), 0.0)
    for name, norm in norms.items():
        squares[together[name]] += norm * norm
    return {name: min(1.0, limit / (math.sqrt(squares[together[name]]) + _EPS)) for name in norms}


def scale_gradients(gradients: Sequence[tuple[Fragment, Tensor]], coefficients: Mapping[str, float]) -> None:
    """Multiply in place."""
    changed = [(gradient, coefficients[f.name]) for f, gradient in gradients if coefficients[f.name] != 1.0]
    if changed:
        _foreach_mul_([gradient for gradient, _ in changed], [factor for _, factor in changed])
