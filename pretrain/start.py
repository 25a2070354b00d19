"""The objective of a configuration and its initial weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pretrain.config import InitConfig, PretrainConfig
from pretrain.core.configlib import ConfigError
from pretrain.engine.checkpoint.commit import CheckpointError, verify
from pretrain.models.backbones import families
from pretrain.models.backbones.contract import ImageEncoder
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.backbones.video import VideoViT
from pretrain.models.backbones.vit import ViT
from pretrain.models.config import ModelConfig
from pretrain.models.importers import Weights, load_official, load_strict
from pretrain.models.importers.channels import other_channels, to_channels
from pretrain.models.layers.ffn import TOPK
from pretrain.models.release.folder import read_release
from pretrain.models.tokenizers.dvae import ConvEncoder
from pretrain.objectives import build
from pretrain.objectives.base import Horizon, Objective


def build_objective(config: PretrainConfig, horizon: Horizon) -> Objective:
    """The objective with its initial weights: equal on every rank, drawn from the seed alone.

    Raises:
        ConfigError: the backbone has nothing that `model.activation_penalty` could act on.
    """
    torch.manual_seed(config.seed)
    objective = build(config.objective.name)(config.objective, build_backbone(config.model), horizon)
    if penalty := config.model.activation_penalty:
        try:
            objective.penalize_activations(penalty.kind, penalty.weight)
        except ValueError as error:
            raise ConfigError("model.activation_penalty", [f"{config.model.name}: {error}"]) from None
    return objective


def build_backbone(model: ModelConfig) -> ImageEncoder:
    """The backbone of a configuration, its weights drawn from torch's generator."""
    if model.timm_name is not None:
        backbone = TimmBackbone(**model.timm_arguments())
    elif model.name == families.CONV:
        return ConvEncoder(**model.conv_arguments())
    else:
        backbone = (ViT if model.num_frames is None else VideoViT)(**model.vit_arguments())
    if model.activation_checkpointing:
        backbone.set_checkpointing(True)
    return backbone


def start_weights(objective: Objective, config: PretrainConfig) -> list[str]:
    """Load the weights of `config.init`, if any, into a new run; return log lines that list what was loaded.

    Raises:
        ConfigError: the source is missing, damaged or of another model; all names that do not match are listed.
    """
    greeting = [] if config.init is None else _load(objective, config.init)
    try:
        objective.begin()
    except ValueError as error:
        raise ConfigError("the start of the run", str(error).splitlines()) from error
    return greeting


def _load(objective: Objective, init: InitConfig) -> list[str]:
    key, source = init.source
    notes: list[str] = []
    try:
        if key == "release":
            release = read_release(source)
            notes = _other_function(release.model, objective.backbone)
            report = objective.load_weights(_chosen(release, init, objective))
        elif key == "official":
            weights = load_official(source, prefix=init.prefix, grid=init.grid)
            notes = [] if weights.facts is None else [f"facts of the file that no weight shows: {weights.facts}"]
            report = objective.load_weights(_chosen(weights, init, objective))
        else:
            verify(Path(source))
            report = load_strict(
                objective, load_file(Path(source) / "model.safetensors"), allow_missing=objective.renewed_prefixes
            )
    except (ValueError, CheckpointError) as error:
        raise ConfigError(f"init.{key}={source}", str(error).splitlines()) from error
    return [f"weights from {source}", *str(report).splitlines(), *notes]


def _other_function(model: Mapping[str, Any], backbone: ImageEncoder) -> list[str]:
    """What computes something else here with the same weights."""
    given, own = ({"ffn": "mlp", "ffn_topk": TOPK, **of} for of in (model, backbone.release_model()))
    differ = [name for name in ("ffn", "ffn_topk") if given[name] != own[name]]
    return [
        f"model.{name} is {own[name]} here, and {given[name]} in the release: it computes differently"
        for name in differ
    ]


def _chosen(weights: Weights, init: InitConfig, objective: Objective) -> Weights:
    """The part of a source that `init` requests, for the channels of the images."""
    if init.fresh_heads:
        weights = replace(weights, heads={})
    own = objective.backbone.state_dict()
    found = other_channels(weights.backbone, own)
    if not found or (init.channels_from is None and len(found) > 1):  # or of another network, which is reported
        return weights
    state, line = to_channels(weights.backbone, own, init.channels_from)
    return replace(weights, backbone=state, converted=(*weights.converted, line))
