"""Configuration of BEiT v2 (Peng et al. 2022, "BEiT v2: Masked Image Modeling with Vector-Quantized Visual
Tokenizers"). No torch here."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pretrain.core.configlib import Positive
from pretrain.data.views.specs import Noise
from pretrain.objectives.configs.shape import ModelShape
from pretrain.objectives.configs.visual_tokens import VisualTokensSection


class BEiT2Config(VisualTokensSection):
    """Masked image modelling on semantic tokens, with an aggregating class token (Peng et al. 2022)."""

    name: Literal["beit2"] = "beit2"
    early_layers: Positive = Field(9, description="block, counted from 1, whose patches the second prediction uses")
    head_layers: Positive = Field(2, description="blocks on the last class token and the early patches")
    shared_lm_head: bool = Field(True, description="the same norm and head for both predictions")

    needs: ClassVar[frozenset[str]] = frozenset({"patches", "class_token", "mask", "layers", "own_blocks"})
    tokenizer_interpolation: ClassVar[Literal["bicubic", "lanczos"]] = "bicubic"
    exact_masks: ClassVar[bool] = True
    file_stride: ClassVar[int | None] = None

    def noises(self, model: ModelShape) -> list[Noise]:
        """Random numbers of the drop path: for the encoder's blocks, then for the head's."""
        return [Noise("drop_path", (model.num_blocks + self.head_layers, 2))] if model.drop_path_rate else []

    def problems(self, model: ModelShape) -> list[str]:
        found = super().problems(model)
        if self.early_layers > model.num_blocks:
            found.append(
                f"objective.early_layers: {self.early_layers}, but the model has {model.num_blocks} blocks; the paper "
                "uses three quarters of them"
            )
        return found
