"""A value that warms up linearly and then follows half a cosine, as DINOv3 schedules everything. No torch here."""

from __future__ import annotations

from pydantic import Field

from pretrain.core.configlib import Config
from pretrain.core.schedule import warmup_cosine


class PhasesConfig(Config):
    """From `start` linearly to `peak`, then half a cosine whose last step is at `end`, then `end`."""

    start: float
    peak: float
    end: float
    warmup_epochs: float = Field(0, ge=0, description="epochs from start to peak; 0: starts at peak")
    cosine_epochs: float | None = Field(
        None, gt=0, description="epochs from peak to end; default: to the end of the run"
    )
    cosine_extra: float = Field(0.0, ge=0, description="cut off a cosine longer by this share")

    def at(self, step: int, *, epoch_steps: int, total_steps: int) -> float:
        """The value for the update after `step` completed steps."""
        return warmup_cosine(
            step,
            start=self.start,
            peak=self.peak,
            final=self.end,
            warmup_steps=round(self.warmup_epochs * epoch_steps),
            total_steps=total_steps,
            cosine_steps=None if self.cosine_epochs is None else round(self.cosine_epochs * epoch_steps),
            cosine_form="closed",
            extra=self.cosine_extra,
        )
