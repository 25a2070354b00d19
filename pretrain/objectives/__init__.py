"""The table of objectives. A new one is one file, one line here and one YAML; nothing here imports torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from pretrain.objectives.configs import DINOConfig, MAEConfig, MoCoV3Config

if TYPE_CHECKING:
    from pretrain.configlib import Config
    from pretrain.objectives.base import Objective

# name -> (its configuration, its class in pretrain.objectives.<name>)
OBJECTIVES: dict[str, tuple[type[Config], str]] = {
    "mae": (MAEConfig, "MAE"),
    "dino": (DINOConfig, "DINO"),
    "mocov3": (MoCoV3Config, "MoCoV3"),
}


def build(name: str) -> type[Objective]:
    """The class of objective `name`. Imports torch.

    Raises:
        ValueError: there is no such objective.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; one of {', '.join(OBJECTIVES)}")
    return getattr(importlib.import_module(f"pretrain.objectives.{name}"), OBJECTIVES[name][1])
