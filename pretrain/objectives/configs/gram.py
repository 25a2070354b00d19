"""Configuration of Gram anchoring (Siméoni et al. 2025, "DINOv3", section 4). No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pretrain.core.configlib import Config, Positive
from pretrain.core.schedule import PhasesConfig
from pretrain.objectives.configs.values import both_sides


class GramConfig(Config):
    """Gram anchoring: similarities between patches are regressed to those of an earlier network, the Gram teacher."""

    weight: float = Field(2.0, ge=0)
    weight_schedule: PhasesConfig | None = Field(None, description="instead of weight")
    teacher: Literal["earlier", "current"] = Field(
        "earlier", description="earlier: a network that stays, from release or the run; current: the run's teacher"
    )
    start_step: int = Field(0, ge=0, description="completed steps after which the Gram loss is used")
    release: str | None = Field(
        None, description="release folder of the Gram teacher; default: the run's own teacher at start_step"
    )
    refresh_steps: int = Field(10000, ge=0, description="steps between refreshes from the run's teacher; 0: none")
    first_refresh_step: int = Field(0, ge=0, description="completed steps before which nothing is refreshed")
    max_refreshes: int | None = Field(3, ge=0, description="refreshes after start_step; null: no limit")
    img_size: Positive | tuple[Positive, Positive] | None = Field(
        None,
        description="pixels of the Gram teacher's view of the global crops, without their colour changes; larger than "
        "model.img_size in the high-resolution stage; default: the global crops themselves",
    )
    antialias: bool = Field(False, description="low-pass filter where its patches are resampled to the student's grid")
    level: Literal["image", "batch"] = Field(
        "image", description="compare the patches of an image, or all those of a micro-batch of a rank"
    )
    tokens: Literal["all", "masked", "unmasked"] = Field(
        "all", description="the patches whose similarities are compared; masked and unmasked: with level: batch only"
    )
    normalize: bool = Field(True, description="compare cosines; false: dot products")
    negatives: Literal["keep", "zero", "zero_teacher"] = Field(
        "keep", description="zero: negative similarities count 0; zero_teacher: those of the Gram teacher only"
    )

    def refreshes(self, step: int) -> bool:
        """Whether the run's teacher becomes the Gram teacher once `step` steps are completed."""
        since, every = step - self.start_step, self.refresh_steps
        if since == 0:
            return self.release is None
        if since < 0 or not every or since % every or step < self.first_refresh_step:
            return False
        before = max(0, -(-(self.first_refresh_step - self.start_step) // every) - 1)  # left out
        return self.max_refreshes is None or since // every - before <= self.max_refreshes

    def problems(self, patch_size: int) -> list[str]:
        """Messages on settings that do not fit each other or patches of this size, each starting with the key."""
        found: list[str] = []
        if self.tokens != "all" and self.level == "image":
            found.append(
                f"objective.gram.tokens: {self.tokens} are not equally many in all images; set gram.level=batch"
            )
        if self.teacher == "current" and self.release is not None:
            found.append(
                "objective.gram.release: the run's current teacher is compared (gram.teacher: current); remove it"
            )
        if self.img_size is not None:
            size = both_sides(self.img_size)
            if any(side % patch_size for side in size):
                near = " x ".join(str(max(1, round(side / patch_size)) * patch_size) for side in size)
                found.append(
                    f"objective.gram.img_size: {size[0]} x {size[1]} is not a multiple of model.patch_size "
                    f"{patch_size}; try {near}"
                )
        return found
