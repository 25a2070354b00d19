"""Configuration of the doctor. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from pretrain.core.configlib import Config, Positive
from pretrain.doctor.rules import RULES


class DoctorConfig(Config):
    """Measures whether the run learns, and logs an alarm with the reason when it does not (docs/doctor.md)."""

    every_steps: Positive = Field(25, description="steps between measurements (features, weights, averages, gradients)")
    images: Positive | None = Field(None, description="number of images measured; default: global batch / 4, 32 to 256")
    reaction: Literal["warn", "stop", "rewind"] = Field(
        "warn", description="on an alarm: log it; end the run without saving; rewind to the last healthy checkpoint"
    )
    off: list[str] = Field(default_factory=list, description="rules that are not applied, by name")

    @field_validator("off")
    @classmethod
    def _known(cls, off: list[str]) -> list[str]:
        strange = sorted(set(off) - set(RULES))
        if strange:
            raise ValueError(f"no rule {', '.join(strange)}; the rules are {', '.join(RULES)}")
        return off
