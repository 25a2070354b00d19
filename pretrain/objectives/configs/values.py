"""Values in the configurations of the objectives: their types, and a size as both of its sides."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0)]
HueShift = Annotated[float, Field(ge=0, le=0.5)]
Sigma = Annotated[float, Field(gt=0)]
Scale = tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]]
Size = tuple[int, int]


def both_sides(size: int | Size) -> Size:
    """(height, width) in pixels of a size given as one side or as both."""
    return size if isinstance(size, tuple) else (size, size)
