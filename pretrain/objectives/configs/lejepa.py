"""Configuration of LeJEPA (Balestriero & LeCun 2025, "LeJEPA: Provable and Scalable Self-Supervised Learning Without
the Heuristics"). No torch here."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pretrain.core.configlib import Positive
from pretrain.data.views.specs import InputSpec
from pretrain.objectives.configs.multi_crop import CropsConfig
from pretrain.objectives.configs.shape import ModelShape
from pretrain.objectives.configs.values import Probability, Scale


class LeJEPAConfig(CropsConfig):
    """Crops of an image agree, and all of them are distributed as N(0, I) (Balestriero & LeCun 2025)."""

    name: Literal["lejepa"] = "lejepa"
    form: Literal["multicrop", "minimal"] = Field(
        "multicrop", description="which of the authors' two losses, see docs/objectives.md"
    )
    sigreg_weight: Probability = Field(0.02, description="of the statistic; minimal weighs the agreement by the rest")
    num_slices: Positive = Field(1024, description="random directions per step")
    t_max: float = Field(3.0, gt=0, description="end of the integral of the statistic")
    num_points: int = Field(17, ge=3, description="points of its trapezoidal rule, an odd number")
    sigreg_clip: float = Field(0.0, ge=0, description="directions with a smaller statistic count 0")
    embedding_dim: Positive = Field(512, description="width of the linear layer before the projector")
    projector_dims: tuple[Positive, ...] = Field(
        (2048, 2048, 512), min_length=1, description="widths of the projector's layers, the last without batch norm"
    )
    sync_bn: bool = Field(True, description="batch norms of the projector over all ranks; false: per rank")
    global_crops_number: Positive = 2
    global_crops_scale: Scale = (0.3, 1.0)
    local_crops_number: int = Field(6, ge=0)
    local_crops_scale: Scale = (0.05, 0.3)
    local_crops_size: Positive | tuple[Positive, Positive] = Field(98, description="pixels, a side or (height, width)")
    blur_prob: Probability = 0.5
    solarize_prob: Probability = 0.2

    batch_coupled: ClassVar[tuple[str, ...]] = (
        "the statistic grows with the images of a step until it reaches its mean for a normal distribution's samples; "
        "sigreg_weight was tuned for batches of 256 to 432",
    )

    @property
    def num_global(self) -> int:
        return self.global_crops_number

    def views(self, model: ModelShape) -> list[InputSpec]:
        """See `crops`: the colours of all crops are alike."""
        colours = {"blur": self.blur(self.blur_prob), "solarize": self.solarize_prob}
        return self.crops(model, [colours] * self.num_global, colours)

    def problems(self, model: ModelShape) -> list[str]:
        found = super().problems(model)
        if self.num_global + self.local_crops_number < 2:
            found.append("objective.global_crops_number: 1 crop in all agrees with itself; give at least 2")
        if self.num_points % 2 == 0:
            found.append(f"objective.num_points: {self.num_points} is even; give {self.num_points + 1}")
        return found
