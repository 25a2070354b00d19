"""What can be set about each objective, and which views of an image it asks for. No torch here."""

from __future__ import annotations

from pretrain.objectives.configs.dino import DINOConfig
from pretrain.objectives.configs.mae import MAEConfig
from pretrain.objectives.configs.mocov3 import MoCoV3Config

ObjectiveConfig = MAEConfig | DINOConfig | MoCoV3Config

__all__ = ["DINOConfig", "MAEConfig", "MoCoV3Config", "ObjectiveConfig"]
