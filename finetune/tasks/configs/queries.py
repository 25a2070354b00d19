"""Configuration of masks from queries, for objects and for classes of pixels. No torch here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from finetune.tasks.configs.values import Strength
from pretrain.core.configlib import Config, Positive


class EoMTSection(Config):
    """Masks from queries in the last blocks of a plain backbone (Kerssies et al. 2025)."""

    name: Literal["eomt"] = "eomt"
    num_queries: Positive
    num_blocks: Positive = Field(4, description="number of the backbone's last blocks that process the queries")
    masked_attention: bool = Field(True, description="in training, annealed to zero block by block")
    num_points: Positive = Field(12544, description="points at which masks are compared")
    mask_weight: Strength = 5.0
    dice_weight: Strength = 5.0
    class_weight: Strength = 2.0
    no_object_weight: Strength = 0.1

    def loss_arguments(self) -> dict[str, Any]:
        """Those of `MaskSetLoss`."""
        weights = {"mask_weight", "dice_weight", "class_weight", "no_object_weight"}
        return self.model_dump(include={"num_points", *weights})

    def head_arguments(self) -> dict[str, Any]:
        """Those of `EoMT`."""
        return self.model_dump(include={"num_queries", "num_blocks", "masked_attention"})
