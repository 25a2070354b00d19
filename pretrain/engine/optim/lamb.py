"""LAMB (You et al. 2020, algorithm 2): Adam's step, scaled for each tensor to a share of the tensor's norm.

The libraries that have it count steps once per group, which a checkpoint of fragments would lose (see `PerWeight`).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from pretrain.engine.optim.per_weight import PerWeight


class LAMB(PerWeight):
    """Every weight is complete. Tensors of one dimension or none are updated as by AdamW, without a trust ratio."""

    def _update(
        self, weight: Tensor, grad: Tensor, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        state["step"] += 1
        count, mean, square = int(state["step"]), state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(grad, 1 - betas[0])
        square.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
        denominator = (square / (1 - betas[1] ** count)).sqrt_().add_(eps)
        update = (mean / (1 - betas[0] ** count)).div_(denominator).add_(weight, alpha=weight_decay)
        if weight.ndim > 1:
            size, length = (cast(Tensor, cast(Any, value).norm()) for value in (weight, update))
            update.mul_(torch.where((size > 0) & (length > 0), size / length, 1.0))
        weight.add_(update, alpha=-lr)
