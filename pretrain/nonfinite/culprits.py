"""Finds the samples of a micro-batch that make its loss or gradient non-finite, by computing parts of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.core import distributed, heartbeat
from pretrain.core.configlib import Precision
from pretrain.core.precision import autocast
from pretrain.objectives.base import Objective

MOST_CULPRITS = 8


@dataclass(frozen=True)
class Outcome:
    """Forward and backward of one micro-batch.

    Attributes:
        losses: by name. bad_gradients: parameters with a non-finite gradient, in the order of the model.
    """

    losses: dict[str, float]
    bad_gradients: tuple[str, ...]

    @property
    def bad_losses(self) -> tuple[str, ...]:
        return tuple(name for name, value in self.losses.items() if not math.isfinite(value))

    @property
    def broken(self) -> bool:
        """A non-finite loss or gradient, as the engine defines it."""
        return not math.isfinite(self.losses["loss"]) or bool(self.bad_gradients)

    def __str__(self) -> str:
        if self.bad_losses:
            return ", ".join(f"{name} {self.losses[name]}" for name in self.bad_losses)
        if self.bad_gradients:
            return f"loss {self.losses['loss']:.4g}, gradient not finite in {len(self.bad_gradients)} parameters"
        return f"loss {self.losses['loss']:.4g}, gradient finite"


def evaluate(
    objective: Objective, batch: Mapping[str, Tensor], step: int, *, seed: int, precision: Precision, scale: float = 1.0
) -> Outcome:
    """Compute `batch` in this process alone, without a change of gradients, buffers or pending updates.

    Args:
        seed: of the random numbers drawn on the device. scale: the loss scale of fp16.
    """
    buffers = {name: buffer.clone() for name, buffer in objective.named_buffers()}
    named = {name: param for name, param in objective.named_parameters() if param.requires_grad}
    device = next(iter(named.values())).device
    torch.manual_seed(seed)
    try:
        with distributed.alone():
            with autocast(device, precision):
                losses = objective(dict(batch), step)
            loss = losses["loss"]
            gradients = torch.autograd.grad(loss * scale, list(named.values()), allow_unused=True)
    finally:
        objective.discard_pending()
        with torch.no_grad():
            for name, buffer in objective.named_buffers():
                buffer.copy_(buffers[name])
    heartbeat.alive()
    norms = {name: gradient.norm() for name, gradient in zip(named, gradients, strict=True) if gradient is not None}
    finite = torch.stack(list(norms.values())).isfinite().tolist()
    return Outcome(
        losses={name: float(value.detach()) for name, value in losses.items()},
        bad_gradients=tuple(name for name, is_finite in zip(norms, finite, strict=True) if not is_finite),
    )


def find_culprits(is_broken: Callable[[Sequence[int]], bool], count: int) -> list[int] | None:
    """The rows of a batch of `count` that make it non-finite, by recursive halving.

    Args:
        is_broken: computes a batch of `count` rows, taken from this batch, some of them several times.

    Returns:
        The rows that each break a batch of copies of that row alone, if the batch is finite once other rows replace
        them; else None: the batch is not broken, or only by a combination of rows, or by more than half of the rows or
        more than MOST_CULPRITS, in which case the weights are the likely cause.
    """
    found: list[int] = []
    groups = [list(range(count))]
    while groups:
        group = groups.pop()
        if not is_broken([group[row % len(group)] for row in range(count)]):
            continue
        if len(group) > 1:
            groups += [group[len(group) // 2 :], group[: len(group) // 2]]
            continue
        found += group
        if len(found) > min(MOST_CULPRITS, max(1, count // 2)):
            return None
    healthy = [row for row in range(count) if row not in found]
    if not found or (healthy and is_broken([healthy[row % len(healthy)] for row in range(count)])):
        return None
    return found


def rows_of(batch: Mapping[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
    """The batch made of `rows` of another."""
    return {name: value[torch.tensor(rows, device=value.device)] for name, value in batch.items()}
