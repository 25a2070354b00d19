"""A fine-tuned classifier as timm opens it: `timm.create_model("local-dir:FOLDER", pretrained=True)`, equal logits.

Low-rank updates are merged into the weights and a probe's batch norm into its linear layer. Classifiers that timm
lacks (attention over patches, class tokens of several blocks) are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from finetune.data.transforms.images import EvalTransform
from finetune.heads.pooled.grid import GridHead
from finetune.heads.pooled.linear import PooledHead
from finetune.heads.pooled.lora import AdaptedLinear, merged_state
from finetune.predictions import Classes
from pretrain.core.files import write_json
from pretrain.core.tensorfile import write_tensors
from pretrain.models.backbones.contract import Backbone
from pretrain.models.importers import load_strict
from pretrain.models.release.folder import backbone_of
from pretrain.models.release.timm_form import TimmModel, from_timm, timm_model, to_timm
from pretrain.models.release.timm_form import config as timm_config

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_NORM = "fc_norm."


class Classifier(Protocol):
    """What is read of a classification task."""

    @property
    def backbone(self) -> Backbone: ...

    @property
    def head(self) -> nn.Module: ...

    classes: Classes
    mean: Tensor
    std: Tensor

    def eval_transform(self) -> EvalTransform: ...


def timm_form(
    task: Classifier, *, img_size: tuple[int, int] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]] | str:
    """The state with timm's names and its config.json; or the reason why timm has no such classifier.

    Args:
        img_size: (height, width) to resample the positions to, as our own model does; timm resamples differently.

    Raises:
        ValueError: another size of a timm model, which timm resamples itself.
    """
    head, backbone = task.head, task.backbone
    linear = _linear(head, backbone)
    if linear is None:
        return f"timm has no classifier that reads its backbone as this one ({type(head).__name__}) does"
    pool, weight, bias = linear
    state = merged_state(backbone)
    if img_size is not None and img_size != tuple(backbone.img_size):
        backbone = _resampled(backbone, state, img_size)
        state = backbone.state_dict()
    model = timm_model(backbone)
    if isinstance(model, str):
        return model
    if not isinstance(model.classifier, str):
        return f"timm's {model.architecture} has no single linear classifier"
    own_norm = head.fc_norm if isinstance(head, PooledHead) else None
    model = replace(model, arguments=model.arguments | _pooling(model, backbone, pool, own_norm))
    state = to_timm(state, model.kind)
    if own_norm is not None:
        state |= {f"{_NORM}{name}": tensor for name, tensor in own_norm.state_dict().items()}
    state |= {f"{model.classifier}.weight": weight, f"{model.classifier}.bias": bias}
    return state, _config(model, backbone, task)


def from_timm_form(task: Classifier, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a pooled `task` with the logits of a state in timm's names.

    What was merged remains merged: low-rank updates are zero, a batch norm is the identity.
    """
    head, backbone, model, state = task.head, task.backbone, timm_model(task.backbone), dict(state)
    assert isinstance(head, PooledHead) and isinstance(model, TimmModel)
    own = {f"head.fc.{name}": state.pop(f"{model.classifier}.{name}") for name in ("weight", "bias")}
    if head.fc_norm is not None:
        own |= {f"head.fc_norm.{name}": state.pop(f"{_NORM}{name}") for name in ("weight", "bias")}
    if head.norm is not None:
        zeros = torch.zeros(backbone.embed_dim)
        own |= {"head.norm.running_mean": zeros, "head.norm.running_var": zeros + 1 - head.norm.eps}
        own["head.norm.num_batches_tracked"] = torch.tensor(0)
    plain = from_timm(state, model.kind, backbone.release_model())
    for path, layer in backbone.named_modules():
        if isinstance(layer, AdaptedLinear):
            plain[f"{path}.frozen"] = plain.pop(f"{path}.weight")
            plain |= {f"{path}.down": torch.zeros_like(layer.down), f"{path}.up": torch.zeros_like(layer.up)}
    return own | {f"backbone.{name}": tensor for name, tensor in plain.items()}


def write_timm(folder: Path | str, task: Classifier, *, img_size: tuple[int, int] | None = None) -> str | None:
    """Write config.json and model.safetensors into `folder`; None, or the reason why timm has no such classifier.

    Raises:
        ValueError: as `timm_form`.
    """
    with torch.no_grad():
        form = timm_form(task, img_size=img_size)
    if isinstance(form, str):
        return form
    state, description = form
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, description)
    (folder / WEIGHTS).unlink(missing_ok=True)
    write_tensors(folder / WEIGHTS, state, {"format": "pt"})
    return None


def _linear(head: nn.Module, backbone: Backbone) -> tuple[str, Tensor, Tensor] | None:
    """The pooling before the linear classifier, its weight and bias; None if the head is not linear in one vector."""
    if isinstance(head, PooledHead):
        return head.pool, *head.as_linear()
    if not isinstance(head, GridHead):
        return None
    cell, fc = head.cells[int(head.best)], head.heads[int(head.best)]
    # timm's hierarchical models take the mean before they normalize, the grid after it
    pools = ("token", "mean") if "layers" in backbone.provides else ("token",)
    if cell.blocks != 1 or cell.pool not in pools or not isinstance(fc, nn.Linear):
        return None
    return cell.pool, fc.weight, fc.bias


def _pooling(model: TimmModel, backbone: Backbone, pool: str, own_norm: nn.Module | None) -> dict[str, Any]:
    """Pooling arguments of timm's class; a class without blocks pools as in its release."""
    if "layers" not in backbone.provides:
        return {}
    if pool == "token":
        return {"global_pool": "token"}
    arguments: dict[str, Any] = {"global_pool": "avg", model.pooled_norm: own_norm is not None}
    return arguments | ({model.token_norm: own_norm is None} if model.token_norm else {})


def _config(model: TimmModel, backbone: Backbone, task: Classifier) -> dict[str, Any]:
    """config.json with the classes and the preparation of images in evaluation."""
    mean, std = ([float(f"{value:.7g}") for value in values.flatten().tolist()] for values in (task.mean, task.std))
    description, transform = timm_config(model, backbone, mean=mean, std=std), task.eval_transform()
    count, names = len(task.classes), list(task.classes)
    prepared = {"num_classes": count, "interpolation": transform.interpolation}
    crop = {"crop_mode": "squash", "crop_pct": 1.0}
    prepared |= crop if transform.whole else {"crop_pct": max(transform.size) / transform.shorter}
    return description | {
        "num_classes": count,
        "label_names": names,
        "model_args": description["model_args"] | {"num_classes": count},
        "pretrained_cfg": description["pretrained_cfg"] | prepared | {"label_names": names},
    }


@torch.no_grad()
def _resampled(backbone: Backbone, state: dict[str, Tensor], img_size: Sequence[int]) -> Backbone:
    """The same network built for another image size."""
    if "own_blocks" not in backbone.provides:
        raise ValueError(f"img_size {list(img_size)}: timm resamples its own models; load it with that img_size")
    model = {**backbone.release_model(), "img_size": list(img_size)}
    new = cast(Backbone, backbone_of(model))
    if isinstance(backbone.trunk.norm, nn.Identity):
        new.trunk.norm = nn.Identity()
    load_strict(new, state, grid=backbone.grid_size)
    return new
