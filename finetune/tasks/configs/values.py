"""Types of values in the configurations of the tasks."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pretrain.core.configlib import Positive

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0)]
Size = Positive | tuple[Positive, Positive]


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a side or a pair."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
