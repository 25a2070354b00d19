"""A fine-tuned classifier as timm opens it: `timm.create_model("local-dir:FOLDER", pretrained=True)`, equal logits.

Low-rank updates are merged into the weights and a probe's batch norm into its linear layer. What timm has no class
for (attention over patches, class tokens of several blocks) is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.heads.grid import GridHead
from finetune.heads.lora import merged_state
from finetune.heads.pooled import PooledHead
from finetune.tasks.classification import Classification
from pretrain.models.importers import load_strict
from pretrain.models.release import backbone_of
from pretrain.models.timm_release import ANY, EVA, TimmModel, timm_model, to_timm
from pretrain.models.timm_release import config as timm_config
from pretrain.models.vit import ViT

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def write_timm(folder: Path | str, task: Classification, *, img_size: tuple[int, int] | None = None) -> str | None:
    """Write config.json and model.safetensors into `folder`; None, or why timm cannot have this classifier.

    Args:
        img_size: (height, width) to resample the positions to, as our own model does; timm would do it otherwise.

    Raises:
        ValueError: another size of a timm model, which timm resamples itself.
    """
    evaluated = task.evaluated
    assert isinstance(evaluated, Classification)
    head = evaluated.head
    pooled, weight, bias = _linear(head)
    if isinstance(head, GridHead) and pooled == "mean" and "layers" not in evaluated.backbone.provides:
        pooled = None  # of normalized places; timm's hierarchical models take the mean first
    if pooled is None or weight is None or bias is None:
        return f"timm has no classifier that reads its backbone as this one ({evaluated.config.train}) does"
    backbone, state = evaluated.backbone, merged_state(evaluated.backbone)
    if img_size is not None and img_size != tuple(backbone.img_size):
        backbone = _resampled(backbone, state, img_size)
        state = backbone.state_dict()
    model = timm_model(backbone)
    if isinstance(model, str):
        return model
    if not isinstance(model.classifier, str):
        return f"timm's {model.architecture} has no single linear classifier"
    own_norm = head.fc_norm if isinstance(head, PooledHead) else None
    model = replace(model, arguments=model.arguments | _pooling(model, backbone, pooled, own_norm))
    state = to_timm(state, model.kind)
    if own_norm is not None:
        state |= {f"fc_norm.{name}": tensor for name, tensor in own_norm.state_dict().items()}
    state |= {f"{model.classifier}.weight": weight, f"{model.classifier}.bias": bias}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    description = _config(model, backbone, evaluated)
    (folder / CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    save_file(plain, folder / WEIGHTS, metadata={"format": "pt"})
    return None


def _linear(head: nn.Module) -> tuple[str | None, Tensor | None, Tensor | None]:
    """How the one vector is pooled that a linear layer reads, and that layer; Nones where it is not so."""
    if isinstance(head, PooledHead):
        return head.pool, *head.as_linear()
    if isinstance(head, GridHead):
        best = int(head.best)
        cell, fc = head.cells[best], head.heads[best]
        if cell.blocks == 1 and cell.pool in ("token", "mean") and isinstance(fc, nn.Linear):
            return cell.pool, fc.weight, fc.bias
    return None, None, None


def _pooling(model: TimmModel, backbone: Any, pool: str, own_norm: nn.Module | None) -> dict[str, Any]:
    """Arguments of timm's class; one without blocks pools as its release does."""
    if "layers" not in backbone.provides:
        return {}
    if pool == "token":
        return {"global_pool": "token"}
    kind = type(backbone.model).__name__ if model.kind == ANY else ""
    name = "fc_norm" if model.kind == "vit" or kind == "VisionTransformer" else "use_fc_norm"
    arguments: dict[str, Any] = {"global_pool": "avg", name: own_norm is not None}
    if model.kind == EVA or kind == "Eva":
        arguments["use_post_transformer_norm"] = own_norm is None
    return arguments


def _config(model: TimmModel, backbone: Any, task: Classification) -> dict[str, Any]:
    """config.json with the classes, and images prepared as in evaluation."""
    mean, std = task.mean.flatten().tolist(), task.std.flatten().tolist()
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
def _resampled(backbone: Any, state: dict[str, Tensor], img_size: Sequence[int]) -> ViT:
    """The same network made for another image size."""
    if not isinstance(backbone, ViT):
        raise ValueError(f"img_size {list(img_size)}: timm resamples its own models; load it with that img_size")
    model = {**backbone.release_model(), "img_size": list(img_size)}
    new = backbone_of(model)
    if isinstance(backbone.norm, nn.Identity):
        new.norm = nn.Identity()
    load_strict(new, state, grid=backbone.grid_size)
    return new
