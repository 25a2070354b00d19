"""What a graph gives, and the error of a network that cannot become one. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


class NotExportableError(ValueError):
    """A network cannot become a graph; the message names it, the reason, and what can be exported."""


@dataclass(frozen=True)
class ExportOutput:
    """One output of a graph.

    name         in the graph and in its record
    content      its shape and meaning
    per_pixel    a map of any size, which the graph resizes to the size of the image
    tolerance    largest allowed difference between graph and network, as a share of the largest value (at least 1)
    """

    name: str
    content: str
    per_pixel: bool = False
    tolerance: float = 1e-4
