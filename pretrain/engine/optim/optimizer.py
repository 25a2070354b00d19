"""The optimizer of a configuration, its param groups, and their hyperparameters at each step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pretrain.core.trainable import ParamGroup
from pretrain.engine.config import OptimConfig
from pretrain.engine.optim.schedules import Schedules


def build_optimizer(optim: OptimConfig, groups: Sequence[ParamGroup]) -> torch.optim.Optimizer:
    """One torch group per (non-empty) ParamGroup, in order; learning rates are set before each step."""
    if optim.clip_grad is not None and optim.clip_mode == "per_module":
        without = [group["name"] for group in groups if "clip_group" not in group]
        if without:
            raise ValueError(
                f"clip_mode 'per_module': param groups {', '.join(without[:5])} have no clip_group; "
                "use global or per_tensor with this objective"
            )
    params = [{"params": group["params"]} for group in groups]
    if optim.name == "adamw":
        return torch.optim.AdamW(params, lr=0.0, betas=optim.betas, eps=optim.eps, weight_decay=0.0, fused=True)
    # LARS is SGD after `lars.adapt` has changed the gradients.
    return torch.optim.SGD(params, lr=0.0, momentum=optim.momentum, weight_decay=0.0)


def trainable_groups(module: nn.Module, groups: Sequence[ParamGroup]) -> list[ParamGroup]:
    """The non-empty groups, after a check that every trainable parameter is in exactly one, under its own name.

    Raises:
        ValueError: a parameter is missing, duplicated, frozen or has the wrong name.
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
        raise ValueError(f"param_groups: no group contains {', '.join(missing[:5])} ({len(missing)} parameters)")
    return [group for group in groups if group["params"]]


def apply_schedules(
    optimizer: torch.optim.Optimizer, groups: Sequence[ParamGroup], schedules: Schedules, step: int
) -> tuple[float, float]:
    """Set lr and weight decay for the update that completes step + 1; returns their values before group scales."""
    lr, weight_decay = schedules.lr_at(step), schedules.weight_decay_at(step)
    is_lars = schedules.optim.name == "lars"
    for target, group in zip(optimizer.param_groups, groups, strict=True):
        target["lr"] = 0.0 if step < group["frozen_steps"] else lr * group["lr_scale"]
        # LARS applies weight decay before its trust ratio, in `lars.adapt`.
        target["weight_decay"] = 0.0 if is_lars else weight_decay * group["weight_decay_scale"]
    return lr, weight_decay


def forget(optimizer: torch.optim.Optimizer, owners: Sequence[Tensor]) -> None:
    """Zero the optimizer state of `owners`, so that a frozen group starts with no history of gradients.

    The official code sets `grad = None` instead, which creates no state; under ZeRO there is no `.grad` to unset.
    """
    for owner in owners:
        for value in optimizer.state[owner].values():
            if isinstance(value, Tensor):
                value.zero_()
