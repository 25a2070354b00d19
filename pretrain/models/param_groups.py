"""Parameter groups: which parameters decay, and which stand still at the start."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn


def split(module: nn.Module, *, no_decay_names: Collection[str] = ()) -> list[dict[str, Any]]:
    """Two groups of the trainable parameters: with weight decay, and without (biases, 1-D and `no_decay_names`).

    Each group is {name, names, params, lr_scale, weight_decay_scale, frozen_steps}: the engine multiplies the learning
    rate and the weight decay of the step by the scales, and keeps the group still for the first `frozen_steps` steps.

    Raises:
        ValueError: a name in `no_decay_names` is not a parameter.
    """
    unknown = set(no_decay_names) - {name for name, _ in module.named_parameters()}
    if unknown:
        raise ValueError(f"no_decay_names: no parameter named {', '.join(sorted(unknown))}")
    groups = [group("decay"), group("no_decay", weight_decay_scale=0.0)]
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim <= 1 or name.endswith(".bias") or name in no_decay_names
            groups[exempt]["names"].append(name)
            groups[exempt]["params"].append(parameter)
    return [g for g in groups if g["params"]]


def group(name: str, *, weight_decay_scale: float = 1.0, frozen_steps: int = 0) -> dict[str, Any]:
    """An empty group."""
    return {
        "name": name,
        "names": [],
        "params": [],
        "lr_scale": 1.0,
        "weight_decay_scale": weight_decay_scale,
        "frozen_steps": frozen_steps,
    }


def take(groups: list[dict[str, Any]], prefix: str, *, into: str, frozen_steps: int) -> list[dict[str, Any]]:
    """Move the parameters whose name starts with `prefix` to groups of their own, keeping their weight decay."""
    result = []
    for source in groups:
        scale = source["weight_decay_scale"]
        moved = group(f"{into}_{source['name']}", weight_decay_scale=scale, frozen_steps=frozen_steps)
        stay = source | {"names": [], "params": []}
        for name, parameter in zip(source["names"], source["params"], strict=True):
            target = moved if name.startswith(prefix) else stay
            target["names"].append(name)
            target["params"].append(parameter)
        result += [g for g in (stay, moved) if g["params"]]
    return result
