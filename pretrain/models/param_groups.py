"""Parameter groups: which parameters decay, which are frozen at first, which are clipped together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from typing import TypedDict, TypeVar

from torch import nn

from pretrain.core.trainable import ParamGroup

KeyT = TypeVar("KeyT", bound=Hashable)


class GroupChange(TypedDict, total=False):
    """The fields of a group in which a part of it differs."""

    name: str
    lr_scale: float
    weight_decay_scale: float
    frozen_steps: int
    keeps_moments: bool
    clip_group: str


def split(module: nn.Module, *, no_decay_names: Collection[str] = (), decay_all: bool = False) -> list[ParamGroup]:
    """Two groups of the trainable parameters: with weight decay, and without (biases, 1-D and `no_decay_names`).

    A layer exempts more of its own in its attribute `no_decay`, as the temperatures of `XCA`.

    Args:
        decay_all: one group, in which everything decays (MoCo v3).

    Raises:
        ValueError: a name in `no_decay_names` is not a parameter.
    """
    unknown = set(no_decay_names) - {name for name, _ in module.named_parameters()}
    if unknown:
        raise ValueError(f"no_decay_names: no parameter named {', '.join(sorted(unknown))}")
    own = {f"{path}.{name}" for path, layer in module.named_modules() for name in getattr(layer, "no_decay", ())}
    exempted = own | set(no_decay_names)
    groups = [group("decay"), group("no_decay", weight_decay_scale=0.0)]
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            exempt = not decay_all and (parameter.ndim <= 1 or name.endswith(".bias") or name in exempted)
            groups[exempt]["names"].append(name)
            groups[exempt]["params"].append(parameter)
    return [g for g in groups if g["params"]]


def tokens_and_positions(module: nn.Module) -> set[str]:
    """Names of the trained class tokens and position tables, which do not decay in BEiT and related methods."""
    ends = ("cls_token", "pos_embed")  # "absolute_pos_embed" too, of Swin
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad and name.endswith(ends)}


def group(name: str, *, weight_decay_scale: float = 1.0, frozen_steps: int = 0) -> ParamGroup:
    """An empty group."""
    return {
        "name": name,
        "names": [],
        "params": [],
        "lr_scale": 1.0,
        "weight_decay_scale": weight_decay_scale,
        "frozen_steps": frozen_steps,
    }


def divide(
    groups: list[ParamGroup], key: Callable[[str], KeyT], change: Callable[[ParamGroup, KeyT], GroupChange]
) -> list[ParamGroup]:
    """Cut every group by `key` of its parameters' names; `change` returns the fields in which that part differs.

    The parts of a group follow each other in the order of their first parameters.
    """
    result: list[ParamGroup] = []
    for source in groups:
        parts: dict[KeyT, ParamGroup] = {}
        for name, parameter in zip(source["names"], source["params"], strict=True):
            at = key(name)
            if at not in parts:
                parts[at] = {**source, **change(source, at), "names": [], "params": []}
            parts[at]["names"].append(name)
            parts[at]["params"].append(parameter)
        result += parts.values()
    return result


def take(
    groups: list[ParamGroup], prefix: str, *, into: str, frozen_steps: int, keeps_moments: bool = False
) -> list[ParamGroup]:
    """Move the parameters whose name starts with `prefix` to groups of their own, frozen for `frozen_steps`.

    Args:
        keeps_moments: the optimizer's moments follow the gradients meanwhile, as with a learning rate of 0 (DINOv2);
            else they start after it, as without a gradient (DINO).
    """

    def change(source: ParamGroup, moved: bool) -> GroupChange:
        if not moved:
            return {}
        changed: GroupChange = {"name": f"{into}_{source['name']}", "frozen_steps": frozen_steps}
        return {**changed, "keeps_moments": True} if keeps_moments else changed

    divided = (divide([source], lambda name: name.startswith(prefix), change) for source in groups)
    return [g for parts in divided for g in sorted(parts, key=lambda g: g["names"][0].startswith(prefix))]


def clip_together(groups: list[ParamGroup], *prefixes: str) -> list[ParamGroup]:
    """Groups of one clip group each: the longest of the prefixes that their names start with.

    With clip_mode "per_module" the engine clips the norm of each clip group separately, as DINOv2 does with backbone
    and heads (Oquab et al. 2023, official code).

    Raises:
        ValueError: a parameter starts with none of the prefixes.
    """

    def module(name: str) -> str:
        found = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default=None)
        if found is None:
            raise ValueError(f"{name}: below none of {', '.join(prefixes)}; every parameter needs a clip group")
        return found

    return divide(groups, module, lambda source, at: {"name": f"{source['name']}_{at.strip('.')}", "clip_group": at})
