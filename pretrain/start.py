"""The objective of a configuration, and what its weights start from."""

from __future__ import annotations

from pathlib import Path

import torch

from pretrain.config import Plan, PretrainConfig
from pretrain.models.vit import ViT
from pretrain.objectives import build
from pretrain.objectives.base import Horizon, Objective


def build_objective(config: PretrainConfig, steps: Plan) -> Objective:
    """The objective with its initial weights: equal on every rank, drawn from the seed alone."""
    torch.manual_seed(config.seed)
    backbone = ViT(**config.model.vit_arguments())
    backbone.set_checkpointing(config.model.activation_checkpointing)
    horizon = Horizon(steps.total_steps, steps.steps_per_epoch)
    return build(config.objective.name)(config.objective, backbone, horizon)


def start_weights(objective: Objective, config: PretrainConfig) -> list[str]:
    return []
