"""The table of objectives. A new one is one file, one line here and one YAML; nothing here imports torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from pretrain.objectives.configs import (
    BEiT2Config,
    BEiTConfig,
    Data2Vec2Config,
    Data2VecConfig,
    DINOConfig,
    DINOv2Config,
    DVAEConfig,
    IBOTConfig,
    IJEPAConfig,
    MAEConfig,
    MoCoV3Config,
    SimMIMConfig,
    VQKDConfig,
)

if TYPE_CHECKING:
    from pretrain.core.configlib import Config
    from pretrain.objectives.base import Objective
    from pretrain.objectives.configs.section import ObjectiveSection

# name -> (its configuration, its class in pretrain.objectives.<name>)
OBJECTIVES: dict[str, tuple[type[Config], str]] = {
    "mae": (MAEConfig, "MAE"),
    "dino": (DINOConfig, "DINO"),
    "ibot": (IBOTConfig, "IBOT"),
    "dinov2": (DINOv2Config, "DINOv2"),
    "mocov3": (MoCoV3Config, "MoCoV3"),
    "simmim": (SimMIMConfig, "SimMIM"),
    "ijepa": (IJEPAConfig, "IJEPA"),
    "data2vec": (Data2VecConfig, "Data2Vec"),
    "data2vec2": (Data2Vec2Config, "Data2Vec2"),
    "beit": (BEiTConfig, "BEiT"),
    "beit2": (BEiT2Config, "BEiT2"),
    "vqkd": (VQKDConfig, "VQKD"),
    "dvae": (DVAEConfig, "DVAE"),
}


def build(name: str) -> type[Objective[ObjectiveSection]]:
    """The class of objective `name`. Imports torch.

    Raises:
        ValueError: there is no such objective.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; one of {', '.join(OBJECTIVES)}")
    return getattr(importlib.import_module(f"pretrain.objectives.{name}"), OBJECTIVES[name][1])
