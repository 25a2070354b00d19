"""Parameter groups of a task: learning rates by layer of its backbone, another one of what is not backbone."""

from __future__ import annotations

from typing import Any

from timm.models._manipulate import group_with_matcher
from torch import nn

from pretrain.core.trainable import ParamGroup
from pretrain.models import param_groups
from pretrain.models.layer_decay import layer_decay as by_layer
from pretrain.models.param_groups import GroupChange

_CLASSIFIER = "a classifier"  # no name that a parameter has


def task_groups(
    task: nn.Module,
    backbone: Any,
    *,
    prefix: str,
    no_decay: set[str],
    layer_decay: float,
    head_lr_scale: float,
) -> list[ParamGroup]:
    """Groups of the trained parameters as `param_groups.split` describes them.

    Args:
        prefix: of the backbone's names, with the dot. no_decay: names without weight decay, beside biases and vectors.
        layer_decay: layer i of d has the learning rate times layer_decay^(d + 1 - i); of a hierarchical model of timm's
            the layers are those that timm gives it.
        head_lr_scale: of everything outside the backbone.
    """
    trained = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    groups = param_groups.split(task, no_decay_names=no_decay & trained)
    inner = prefix + backbone.blocks_prefix
    if layer_decay < 1 and any(name.startswith(prefix) for name in trained):
        if "layers" in backbone.provides:
            groups = by_layer(groups, decay=layer_decay, depth=backbone.depth, prefix=inner)
        else:
            groups = _by_layer_of_timm(groups, backbone, prefix=inner, decay=layer_decay)
    if head_lr_scale == 1:
        return groups

    def change(source: ParamGroup, is_backbone: bool) -> GroupChange:
        if is_backbone:
            return {}
        return {"name": f"{source['name']}_head", "lr_scale": source["lr_scale"] * head_lr_scale}

    return param_groups.divide(groups, lambda name: name.startswith(prefix), change)


def _by_layer_of_timm(groups: list[ParamGroup], backbone: Any, *, prefix: str, decay: float) -> list[ParamGroup]:
    """Layers as timm counts them: stem, each block of each stage; a classifier, and what timm has beside it, do not
    decay."""
    names = [name for name, _ in backbone.model.named_parameters()]
    matcher = backbone.model.group_matcher(coarse=False)
    # What no rule of timm's names is its last layer, as its classifier is, which this model lacks.
    layers: Any = group_with_matcher(((name, name) for name in [*names, _CLASSIFIER]), matcher, reverse=True)

    def change(source: ParamGroup, layer: int | None) -> GroupChange:
        if layer is None:
            return {}
        scale = source["lr_scale"] * decay ** (layers[_CLASSIFIER] - layer)
        return {"name": f"{source['name']}_layer{layer}", "lr_scale": scale}

    def place(name: str) -> int | None:
        return layers.get(name.removeprefix(prefix)) if name.startswith(prefix) else None

    return param_groups.divide(groups, place, change)
