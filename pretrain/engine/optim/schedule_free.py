"""Schedule-free AdamW (Defazio et al. 2024, algorithm 1): an average of the weights replaces a falling learning rate.

Three sequences: z takes AdamW's steps, x averages z, and gradients are taken at y = (1 - beta1) z + beta1 x. The
model's parameters are y while it trains; x is what is evaluated and released.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from pretrain.core import distributed
from pretrain.core.configlib import ConfigError
from pretrain.engine.optim.fragments import Fragment
from pretrain.engine.optim.per_weight import PerWeight


class ScheduleFreeAdamW(PerWeight):
    """Elementwise, so a weight may be a flat partition. A step counts in x by the square of its learning rate."""

    def _update(
        self, y: Tensor, grad: Tensor, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        state = self.state[y]
        if not state:
            state["step"], state["weight_sum"] = torch.zeros(()), torch.zeros((), dtype=torch.float64)
            state["z"], state["exp_avg_sq"] = y.detach().clone(), torch.zeros_like(y)
        state["step"] += 1
        z, square = state["z"], state["exp_avg_sq"]
        rate = lr * (1 - betas[1] ** int(state["step"])) ** 0.5
        state["weight_sum"] += rate**2
        total = float(state["weight_sum"])
        share = rate**2 / total if total else 0.0
        square.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
        update = (grad / square.sqrt().add_(eps)).add_(y, alpha=weight_decay)
        # With x written by y and z: x' = (1 - share) x + share z', y' = (1 - beta1) z' + beta1 x'.
        y.lerp_(z, share).add_(update, alpha=-rate * (1 - betas[0] * (1 - share)))
        z.sub_(update, alpha=rate)

    def average(self, y: Tensor) -> Tensor:
        """x of the parameter `y`, of its shape; `y` itself before its first step."""
        if "z" not in self.state.get(y, {}):
            return y.detach()
        beta = next(group["betas"][0] for group in self.param_groups if any(y is p for p in group["params"]))
        return y.detach().lerp(self.state[y]["z"], 1 - 1 / beta)


@contextmanager
def averaged(
    params: Mapping[str, nn.Parameter],
    optimizer: ScheduleFreeAdamW,
    fragments: Sequence[Fragment],
    *,
    partitioned: bool,
) -> Generator[None]:
    """`params`, by name, are x inside and y again afterwards, bitwise. Collective.

    Args:
        fragments: of this rank. partitioned: the parts of x are put together from all ranks.
    """
    trained = [param.detach().clone() for param in params.values()]
    with torch.no_grad():
        x = {name: torch.zeros(param.numel(), device=param.device) for name, param in params.items()}
        for fragment in fragments:
            part = fragment.of(optimizer.average(fragment.owner))
            x[fragment.name][fragment.start : fragment.stop] = part.to(x[fragment.name].device)
        for name, param in params.items():
            param.copy_((distributed.all_reduce_sum(x[name]) if partitioned else x[name]).view_as(param))
        del x
    try:
        yield
    finally:
        with torch.no_grad():
            for param, value in zip(params.values(), trained, strict=True):
                param.copy_(value)


def check_no_statistics(module: nn.Module) -> None:
    """Refuse batch norms that keep running statistics: those of y, which do not fit the features of x.

    Raises:
        ConfigError: there are some.
    """
    norms = [
        name
        for name, layer in cast(Iterable[tuple[str, nn.Module]], cast(Any, module).named_modules())
        if isinstance(layer, _BatchNorm) and layer.track_running_stats
    ]
    if norms:
        raise ConfigError(
            "optim.name",
            [
                f"schedule_free_adamw: {', '.join(norms[:3])} ({len(norms)} in all) keep statistics of the trained "
                "weights, but their average is evaluated; use adamw, or a network without batch norm"
            ],
        )
