"""Optimizers by name, and the learning rate and weight decay of every step as pure functions of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pretrain.core.schedule import WarmupForm, cosine, multistep, poly, warmup, warmup_cosine
from pretrain.core.trainable import ParamGroup


@dataclass(frozen=True)
class OptimSettings:
    """Optimizer and schedules.

    Attributes:
        lr: peak, absolute (not per 256 samples). min_lr: at `total_steps`, of the cosines and poly.
        schedule: after the warm-up: "cosine" from its end, "cosine_whole" counted from step 0 (timm), "multistep"
            times `gamma` at each of `milestones`, "poly" from the warm-up's end as (1 - t)^power, "constant".
        milestones: steps, ascending.
        warmup_lr: of step 0, where the warm-up starts.
        warmup_form: "open" meets the peak at step W, "closed" at step W - 1 (see `schedule.warmup_cosine`).
        first_step: the step whose values the first update takes: 0, or 1 (I-JEPA's schedulers count before it).
        weight_decay_end: where a half cosine from `weight_decay` ends; None: constant.
        momentum: of sgd and lars. trust_coefficient: of lars.
        clip_mode: "global" clips the norm of all gradients together, "per_tensor" each parameter's (official code of
            Caron et al. 2021), "per_module" that of each `clip_group` of the param groups (Oquab et al. 2023);
            "none" leaves them.
        clip_grad: the largest norm allowed.
        head_warmup_steps: for so many steps only parameters whose names start with `head_prefixes` are trained.
    """

    lr: float
    total_steps: int
    name: Literal["adamw", "sgd", "lars"] = "adamw"
    min_lr: float = 0.0
    schedule: Literal["cosine", "cosine_whole", "multistep", "poly", "constant"] = "cosine"
    power: float | None = None
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    weight_decay: float = 0.0
    weight_decay_end: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9
    trust_coefficient: float = 0.001
    warmup_steps: int = 0
    warmup_lr: float = 0.0
    warmup_form: WarmupForm = "open"
    first_step: Literal[0, 1] = 0
    clip_grad: float = 0.0
    clip_mode: Literal["none", "global", "per_tensor", "per_module"] = "none"
    head_prefixes: tuple[str, ...] = ()
    head_warmup_steps: int = 0

    def lr_at(self, step: int) -> float:
        """Of the update that completes step + 1."""
        step += self.first_step
        if self.schedule in ("cosine", "cosine_whole"):
            return warmup_cosine(
                step,
                peak=self.lr,
                final=self.min_lr,
                warmup_steps=self.warmup_steps,
                total_steps=self.total_steps,
                warmup_form=self.warmup_form,
                start=self.warmup_lr,
                whole=self.schedule == "cosine_whole",
            )
        if step < self.warmup_steps:
            start, steps = self.warmup_lr, self.warmup_steps
            return warmup(step, start=start, peak=self.lr, warmup_steps=steps, form=self.warmup_form)
        if self.schedule == "poly":
            return poly(
                step,
                peak=self.lr,
                final=self.min_lr,
                power=1.0 if self.power is None else self.power,
                start_step=self.warmup_steps,
                total_steps=self.total_steps,
            )
        milestones = self.milestones if self.schedule == "multistep" else ()
        return multistep(step, peak=self.lr, milestones=milestones, gamma=self.gamma)

    def weight_decay_at(self, step: int) -> float:
        if self.weight_decay_end is None:
            return self.weight_decay
        return cosine(step + self.first_step, self.weight_decay, self.weight_decay_end, self.total_steps)


def build_optimizer(settings: OptimSettings, groups: Sequence[ParamGroup]) -> torch.optim.Optimizer:
    """One torch group per (non-empty) ParamGroup, in order; learning rates are set before each step."""
    if settings.clip_mode != "none" and settings.clip_grad <= 0:
        raise ValueError(f"clip_mode {settings.clip_mode!r} with clip_grad {settings.clip_grad}: give a norm above 0")
    if settings.clip_mode == "per_module":
        without = [group["name"] for group in groups if "clip_group" not in group]
        if without:
            raise ValueError(
                f"clip_mode 'per_module': param groups {', '.join(without[:5])} name no module to clip; "
                "use global or per_tensor with this objective"
            )
    params = [{"params": group["params"]} for group in groups]
    if settings.name == "adamw":
        return torch.optim.AdamW(params, lr=0.0, betas=settings.betas, eps=settings.eps, weight_decay=0.0, fused=True)
    if settings.name in ("sgd", "lars"):  # of lars, `lars.adapt` has done what differs
        return torch.optim.SGD(params, lr=0.0, momentum=settings.momentum, weight_decay=0.0)
    raise ValueError(f"optimizer {settings.name!r}: expected adamw, sgd or lars")


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
        # LARS decays before its trust ratio, in `lars.adapt`.
        target["weight_decay"] = 0.0 if settings.name == "lars" else weight_decay * group["weight_decay_scale"]
    return lr, weight_decay


def forget(optimizer: torch.optim.Optimizer, owners: Sequence[Tensor]) -> None:
    """Zero the optimizer state of `owners`, so that a frozen group starts as if it had never seen a gradient.

    The official code sets `grad = None` instead, which leaves no state behind; under ZeRO there is no `.grad` to unset.
    """
    for owner in owners:
        for value in optimizer.state[owner].values():
            if isinstance(value, Tensor):
                value.zero_()
