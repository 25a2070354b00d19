"""An optimizer that updates one weight after another, with a state of its own for each."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, cast

import torch
from torch import Tensor


class PerWeight(torch.optim.Optimizer):
    """Group options: lr, betas, eps, weight_decay. Each weight counts its own steps: a checkpoint holds the count, and
    it starts with a frozen group."""

    def __init__(self, params: Any, *, betas: tuple[float, float], eps: float):
        super().__init__(params, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None
        for group in self.param_groups:
            for weight in cast(list[Tensor], group["params"]):
                if weight.grad is not None:
                    self._update(weight, weight.grad, **{key: group[key] for key in self.defaults})

    @abstractmethod
    def _update(
        self, weight: Tensor, grad: Tensor, /, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        """Update `weight` and its state in place."""
