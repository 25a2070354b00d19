"""Base class of objectives whose loss is one of all images of a step, also where accumulation divides them.

Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (GradCache): features of all
micro-batches are computed without gradient first; the loss of all of them then gives each micro-batch its gradient.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from pretrain.objectives.base import Objective
from pretrain.objectives.configs.section import ObjectiveSection

WholeT = TypeVar("WholeT", bound=ObjectiveSection, covariant=True)


class WholeStep(Objective[WholeT]):
    """`forward` computes the features of its micro-batch. While `survey` is true it gives them to `keep` and returns;
    otherwise it computes the loss of what `of_step` returns. The engine averages the micro-batches' gradients: of
    features those of this loss, of what comes after them the mean of equal ones."""

    survey = False

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[Tensor] = []
        self._passed = 0  # micro-batches of this step that came again

    @contextmanager
    def surveying(self) -> Generator[None]:
        """See `core.trainable.Surveying`."""
        self._kept, self._passed, self.survey = [], 0, True
        try:
            yield
        finally:
            self.survey = False
            super().discard_pending()

    def keep(self, features: Tensor) -> None:
        """Features of the next micro-batch of the survey."""
        self._kept.append(features.detach())

    def of_step(self, features: Tensor, dim: int) -> Tensor:
        """Features of this rank's whole step, joined along `dim`: `features` of this micro-batch with their gradient,
        which is multiplied by the number of micro-batches, since the engine divides it; the others as they were kept.
        """
        if self._passed >= len(self._kept):
            return features
        parts, index = list(self._kept), self._passed
        parts[index] = features + (len(parts) - 1) * (features - features.detach())
        self._passed += 1
        return torch.cat(parts, dim=dim)

    def after_step(self, step: int) -> None:
        super().after_step(step)
        self._kept = []

    def discard_pending(self) -> None:
        super().discard_pending()
        self._kept = []
