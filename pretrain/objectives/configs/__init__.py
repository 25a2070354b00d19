"""What can be set about each objective, and which views of an image it asks for. No torch here."""

from __future__ import annotations

from pretrain.objectives.configs.dino import DINOConfig
from pretrain.objectives.configs.mae import MAEConfig

ObjectiveConfig = MAEConfig | DINOConfig

__all__ = ["DINOConfig", "MAEConfig", "ObjectiveConfig"]
