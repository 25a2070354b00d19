"""The objective of a configuration, and what its weights start from."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from pretrain.config import PretrainConfig
from pretrain.configlib import ConfigError
from pretrain.engine.commit import CheckpointError, verify
from pretrain.models.importers import load_official, load_strict
from pretrain.models.release import read_release
from pretrain.models.vit import ViT
from pretrain.objectives import build
from pretrain.objectives.base import Horizon, Objective


def build_objective(config: PretrainConfig, horizon: Horizon) -> Objective:
    """The objective with its initial weights: equal on every rank, drawn from the seed alone."""
    torch.manual_seed(config.seed)
    backbone = ViT(**config.model.vit_arguments())
    backbone.set_checkpointing(config.model.activation_checkpointing)
    return build(config.objective.name)(config.objective, backbone, horizon)


def start_weights(objective: Objective, config: PretrainConfig) -> list[str]:
    """Load what `config.init` names into the objective; lines that say what fitted.

    Raises:
        ConfigError: the source is missing, damaged or of another model; every name that does not fit is listed.
    """
    init = config.init
    if init is None:
        return []
    try:
        if init.release is not None:
            key, source = "release", init.release
            report = objective.load_weights(read_release(source))
        elif init.official is not None:
            key, source = "official", init.official
            report = objective.load_weights(load_official(source))
        else:
            assert init.checkpoint is not None
            key, source = "checkpoint", init.checkpoint
            verify(Path(source))
            report = load_strict(objective, load_file(Path(source) / "model.safetensors"))
    except (ValueError, CheckpointError) as error:
        raise ConfigError(f"init.{key}={source}", str(error).splitlines()) from error
    return [f"weights from {source}", *str(report).splitlines()]
