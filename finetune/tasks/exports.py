"""What a task reports about itself so that `finetune.export` can turn it into a graph."""

from __future__ import annotations

from dataclasses import dataclass

EXPORTABLE = "exportable tasks: classification, segmentation, depth, and detection with head detr or eomt"


class NotExportableError(ValueError):
    """The task cannot become a graph; the message names it, the reason, and what can be exported."""


@dataclass(frozen=True)
class ExportOutput:
    """One output of the graph of a task.

    name         in the graph and in export.json
    content      its shape and meaning
    per_pixel    a map of any size, which the graph resizes to the size of the image
    tolerance    largest allowed difference between graph and task, as a share of the largest value (at least 1)
    """

    name: str
    content: str
    per_pixel: bool = False
    tolerance: float = 1e-4
