"""Small fine-tuned tasks of every kind, untrained: what predicting and exporting are tested on."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import nn

from finetune.predictions import Classes
from finetune.tasks import task_class
from finetune.tasks.base import Task
from finetune.tasks.configs import TaskConfig
from finetune.tasks.opened import OpenedBackbone
from pretrain.core.configlib import Config, validate
from pretrain.models.backbones.contract import Backbone
from pretrain.models.backbones.vit import ViT

CLASSES = ("cat", "dog", "cow")


class _Section(Config):
    task: TaskConfig = Field(discriminator="name")


def small_task(
    name: str,
    *,
    classes: Classes | None = None,
    vit: dict[str, Any] | None = None,
    backbone: Backbone | None = None,
    **section: Any,
) -> Task:
    """A task on a ViT of 2 blocks, 32 wide, for images of 32 pixels in patches of 8, or on `backbone`; `vit` and
    `section` add keys."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "pos_embed": "learned"}
    backbone = backbone or ViT((32, 32), 8, **{**arguments, **(vit or {})})
    opened = OpenedBackbone(backbone, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3), "a small ViT")
    config = validate(_Section, {"task": {"name": name, **section}}, source="test").task
    task = task_class(name)(config, opened, Classes(CLASSES) if classes is None else classes)
    with torch.no_grad():  # heads start near zero: everything they say would be the same
        for parameter in task.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.15)
    return task.eval()
