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
    early_layers: Positive = Field(9, description="blocks before the patches that the class token must complete")
    head_layers: Positive = Field(2, description="blocks on the class token and those patches")
    shared_lm_head: bool = Field(True, description="one norm and one head for both predictions")

    needs: ClassVar[frozenset[str]] = frozenset({"patches", "class_token", "mask", "layers", "own_blocks"})
    tokenizer_interpolation: ClassVar[Literal["bicubic", "lanczos"]] = "bicubic"
    exact_masks: ClassVar[bool] = True
    file_stride: ClassVar[int | None] = None

    def noises(self, model: ModelShape) -> list[Noise]:
        """The numbers of the drop path: of the encoder's blocks, then of those of the head."""
        return [Noise("drop_path", (model.num_blocks + self.head_layers, 2))] if model.drop_path_rate else []

    def problems(self, model: ModelShape) -> list[str]:
        found = super().problems(model)
        if self.early_layers > model.num_blocks:
            found.append(
                f"objective.early_layers: {self.early_layers}, but the model has {model.num_blocks} blocks; the paper "
                "takes three quarters of them"
            )
        return found
