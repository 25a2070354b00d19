"""Parameter groups of a task: learning rates by layer of the backbone, and a separate one outside it."""

from __future__ import annotations

from torch import nn

from pretrain.core.trainable import ParamGroup
from pretrain.models import param_groups
from pretrain.models.backbones.contract import Backbone
from pretrain.models.layer_decay import layer_decay as by_layer
from pretrain.models.param_groups import GroupChange


def task_groups(
    task: nn.Module,
    backbone: Backbone,
    *,
    prefix: str,
    no_decay: set[str],
    layer_decay: float,
    head_lr_scale: float,
) -> list[ParamGroup]:
    """Groups of the trained parameters as `param_groups.split` describes them.

    Args:
        prefix: of the names of the backbone's parameters, with the dot.
        no_decay: names without weight decay, in addition to biases and vectors.
        layer_decay: the learning rate of layer i of d is multiplied by layer_decay^(d + 1 - i); a hierarchical backbone
            has the layers of its `layer_numbers`.
        head_lr_scale: of everything outside the backbone.
    """
    trained = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    groups = param_groups.split(task, no_decay_names=no_decay & trained)
    inner = prefix + backbone.blocks_prefix
    if layer_decay < 1 and any(name.startswith(prefix) for name in trained):
        if "layers" in backbone.provides:
            groups = by_layer(groups, decay=layer_decay, depth=backbone.depth, prefix=inner)
        else:
            groups = _by_stage(groups, backbone, prefix=inner, decay=layer_decay)
    if head_lr_scale == 1:
        return groups

    def change(source: ParamGroup, is_backbone: bool) -> GroupChange:
        if is_backbone:
            return {}
        return {"name": f"{source['name']}_head", "lr_scale": source["lr_scale"] * head_lr_scale}

    return param_groups.divide(groups, lambda name: name.startswith(prefix), change)


def _by_stage(groups: list[ParamGroup], backbone: Backbone, *, prefix: str, decay: float) -> list[ParamGroup]:
    """Learning rates by the layers of a hierarchical backbone; parameters in none of them keep theirs."""
    layers, last = backbone.layer_numbers()

    def change(source: ParamGroup, layer: int | None) -> GroupChange:
        if layer is None:
            return {}
        return {"name": f"{source['name']}_layer{layer}", "lr_scale": source["lr_scale"] * decay ** (last - layer)}

    def layer_of(name: str) -> int | None:
        return layers.get(name.removeprefix(prefix)) if name.startswith(prefix) else None

    return param_groups.divide(groups, layer_of, change)
