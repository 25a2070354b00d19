"""Configuration of BEiT (Bao et al. 2021, "BEiT: BERT Pre-Training of Image Transformers"). No torch here."""

from __future__ import annotations

from typing import ClassVar, Literal

from pretrain.objectives.configs.visual_tokens import VisualTokensSection


class BEiTConfig(VisualTokensSection):
    """Masked image modelling on visual tokens (Bao et al. 2021)."""

    name: Literal["beit"] = "beit"

    needs: ClassVar[frozenset[str]] = frozenset({"patches", "mask"})
    tokenizer_interpolation: ClassVar[Literal["bicubic", "lanczos"]] = "lanczos"
    exact_masks: ClassVar[bool] = False
    file_stride: ClassVar[int | None] = 8  # of DALL-E's encoder
