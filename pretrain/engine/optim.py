"""Optimizers by name, and the learning rate and weight decay of every step as pure functions of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pretrain.engine.trainable import ParamGroup
from pretrain.schedule import WarmupForm, cosine, warmup_cosine


@dataclass(frozen=True)
class OptimSettings:
    """Optimizer and schedules.

    Attributes:
        lr: peak, absolute (not per 256 samples). min_lr: at `total_steps`.
        weight_decay_end: where a half cosine from `weight_decay` ends; None: constant.
        warmup_form: "open" meets the peak at step W, "closed" at step W - 1 (see `schedule.warmup_cosine`).
        clip_mode: "global" clips the norm of all gradients together, "per_tensor" each parameter's (official code of
            Caron et al. 2021); "none" leaves them.
        clip_grad: the largest norm allowed.
    """

    lr: float
    total_steps: int
    name: Literal["adamw", "sgd"] = "adamw"
    min_lr: float = 0.0
    weight_decay: float = 0.0
    weight_decay_end: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9
    warmup_steps: int = 0
    warmup_form: WarmupForm = "open"
    clip_grad: float = 0.0
    clip_mode: Literal["none", "global", "per_tensor"] = "none"

    def lr_at(self, step: int) -> float:
        return warmup_cosine(
            step,
            peak=self.lr,
            final=self.min_lr,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
            warmup_form=self.warmup_form,
        )

    def weight_decay_at(self, step: int) -> float:
        if self.weight_decay_end is None:
            return self.weight_decay
        return cosine(step, self.weight_decay, self.weight_decay_end, self.total_steps)


def build_optimizer(settings: OptimSettings, groups: Sequence[ParamGroup]) -> torch.optim.Optimizer:
    """One torch group per (non-empty) ParamGroup, in order; learning rates are set before each step."""
    if settings.clip_mode != "none" and settings.clip_grad <= 0:
        raise ValueError(f"clip_mode {settings.clip_mode!r} with clip_grad {settings.clip_grad}: give a norm above 0")
    params = [{"params": group["params"]} for group in groups]
    if settings.name == "adamw":
        return torch.optim.AdamW(params, lr=0.0, betas=settings.betas, eps=settings.eps, weight_decay=0.0, fused=True)
    if settings.name == "sgd":
        return torch.optim.SGD(params, lr=0.0, momentum=settings.momentum, weight_decay=0.0)
    raise ValueError(f"optimizer {settings.name!r}: expected adamw or sgd")


def trainable_groups(module: nn.Module, groups: Sequence[ParamGroup]) -> list[ParamGroup]:
    """The non-empty groups, after checking that every trainable parameter is in exactly one of them under its own name.

    Raises:
        ValueError: a parameter is missing, twice, frozen or misnamed.
    """
    known = dict(module.named_parameters())
    seen: set[str] = set()
    for group in groups:
        for name, param in zip(group["names"], group["params"], strict=True):
            if known.get(name) is not param:
                raise ValueError(f"param_groups: {name!r} of group {group['name']!r} is not the model's parameter")
            if name in seen:
                raise ValueError(f"param_groups: {name!r} is in two groups")
            if not param.requires_grad:
                raise ValueError(f"param_groups: {name!r} does not require a gradient; leave it out")
            seen.add(name)
    missing = [name for name, param in known.items() if param.requires_grad and name not in seen]
    if missing:
        raise ValueError(f"param_groups: no group has {', '.join(missing[:5])} ({len(missing)} parameters)")
    return [group for group in groups if group["params"]]


def apply_schedules(
    optimizer: torch.optim.Optimizer, groups: Sequence[ParamGroup], settings: OptimSettings, step: int
) -> tuple[float, float]:
    """Set lr and weight decay for the update that completes step + 1; returns those of an unscaled group."""
    lr, weight_decay = settings.lr_at(step), settings.weight_decay_at(step)
    for target, group in zip(optimizer.param_groups, groups, strict=True):
        target["lr"] = 0.0 if step < group["frozen_steps"] else lr * group["lr_scale"]
        target["weight_decay"] = weight_decay * group["weight_decay_scale"]
    return lr, weight_decay


def forget(optimizer: torch.optim.Optimizer, owners: Sequence[Tensor]) -> None:
    """Zero the optimizer state of `owners`, so that a frozen group starts as if it had never seen a gradient.

    The official code sets `grad = None` instead, which leaves no state behind; under ZeRO there is no `.grad` to unset.
    """
    for owner in owners:
        for value in optimizer.state[owner].values():
            if isinstance(value, Tensor):
                value.zero_()
