"""The optimizer of a configuration, its param groups, and their hyperparameters at each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.optim.lion import Lion
from torch import Tensor, nn

from pretrain.core.trainable import ParamGroup
from pretrain.engine.config import OptimConfig
from pretrain.engine.optim.lamb import LAMB
from pretrain.engine.optim.muon import MuonAndAdamW, hidden_matrices
from pretrain.engine.optim.schedule_free import ScheduleFreeAdamW
from pretrain.engine.optim.schedules import Schedules
from pretrain.engine.optim.table import KINDS


def build_optimizer(optim: OptimConfig, groups: Sequence[ParamGroup]) -> torch.optim.Optimizer:
    """One torch group per (non-empty) ParamGroup, in order; learning rates are set before each step."""
    if optim.clip_grad is not None and optim.clip_mode == "per_module":
        without = [group["name"] for group in groups if "clip_group" not in group]
        if without:
            raise ValueError(
                f"clip_mode 'per_module': param groups {', '.join(without[:5])} have no clip_group; "
                "use global or per_tensor with this objective"
            )
    params = [{"params": group["params"], "hidden": group.get("hidden", False)} for group in groups]
    options: dict[str, Any] = {key: getattr(optim, key) for key in KINDS[optim.name].options}
    zero: dict[str, Any] = {"lr": 0.0, "weight_decay": 0.0}
    match optim.name:
        case "adamw":
            return torch.optim.AdamW(params, fused=True, **options, **zero)
        case "adam":
            return torch.optim.Adam(params, fused=True, **options, **zero)
        case "sgd":
            return torch.optim.SGD(params, **options, **zero)
        case "lars":  # SGD after `lars.adapt` has changed the gradients
            return torch.optim.SGD(params, momentum=options["momentum"], **zero)
        case "lion":
            return Lion(params, **options, **zero)
        case "lamb":
            return LAMB(params, **options)
        case "muon":
            return MuonAndAdamW(params, **options)
        case "schedule_free_adamw":
            return ScheduleFreeAdamW(params, **options)


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


def state_bytes(optim: OptimConfig, module: nn.Module) -> int:
    """Bytes of optimizer state for the trained parameters of `module`; counters are not counted."""
    kept = {name: value for name, value in module.named_parameters() if value.requires_grad}
    hidden = hidden_matrices(module) if optim.name == "muon" else set[str]()
    if optim.name in ("sgd", "lars") and not optim.momentum:
        return 0
    copies = 1 if optim.name in ("sgd", "lars", "lion") else 2  # of each parameter, in fp32
    return sum(4 * value.numel() * (1 if name in hidden else copies) for name, value in kept.items())


def forget(optimizer: torch.optim.Optimizer, owners: Sequence[Tensor]) -> None:
    """Zero the optimizer state of `owners`, so that a frozen group starts with no history of gradients.

    A copy of the weights ("z" of schedule-free AdamW) is set to the weights instead.

    The official code sets `grad = None` instead, which creates no state; under ZeRO there is no `.grad` to unset.
    """
    for owner in owners:
        for key, value in optimizer.state[owner].items():
            if key == "z":
                value.copy_(owner)
            elif isinstance(value, Tensor):
                value.zero_()
