"""Configuration of DINO (Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers"). No torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pretrain.core.configlib import Positive
from pretrain.objectives.configs.self_distillation import SelfDistillationConfig


class DINOConfig(SelfDistillationConfig):
    """Self-distillation without labels (Caron et al. 2021)."""

    name: Literal["dino"] = "dino"
    out_dim: Positive = Field(65536, description="number of prototypes")
    head_hidden_dim: Positive = 2048
    head_bottleneck_dim: Positive = 256
    head_nlayers: Positive = 3
    use_bn_in_head: bool = False
    norm_last_layer: bool = Field(True, description="fix prototypes at length 1; false is better for small ViTs")
    teacher_temp: float = Field(0.04, gt=0)
    warmup_teacher_temp: float = Field(0.04, gt=0)
    warmup_teacher_temp_epochs: int = Field(0, ge=0)

    needs: ClassVar[frozenset[str]] = frozenset({"image"})
    batch_coupled: ClassVar[tuple[str, ...]] = ("teacher_temp and its warm-up were tuned for batches of 512 to 1,024",)
