"""A task as a graph that runs without Fovea; how graphs are written and compared: `pretrain.models.export.graph`."""

from __future__ import annotations

import copy

from torch import Tensor

from finetune.heads.pixels.dense_parts import resize
from finetune.tasks.base import Task
from pretrain.models.backbones.contract import Backbone
from pretrain.models.export import graph as graphs
from pretrain.models.export.outputs import NotExportableError


class Graph(graphs.Graph):
    """Pixels [b, C, H, W] in 0 to 1 -> the outputs of a copy of the task, from which it makes predictions.

    Raises:
        NotExportableError: the task cannot become a graph.
    """

    def __init__(self, task: Task):
        super().__init__()
        self.outputs = task.export_outputs()
        self.task = copy.deepcopy(task).eval().requires_grad_(False)
        try:
            self.task.prepare_export()
        except ValueError as error:
            raise NotExportableError(str(error)) from error
        self.title = f"{task.config.name} on {self.backbone.title}"
        self.patch, self.fixed = self.backbone.patch_size, task.fixed_size_reason()
        self.min_patches, self.detects = max(graphs.MIN_PATCHES, -(-task.smallest_side // self.patch)), task.detects

    @property
    def backbone(self) -> Backbone:
        return self.task.bare_backbone

    def forward(self, images: Tensor, content: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        normalized = (images - self.task.mean) / self.task.std
        if content is not None:
            return self.task.detections(normalized, content)
        found = self.task.outputs(normalized)
        size = (images.shape[2], images.shape[3])
        sized = tuple(
            resize(value, size) if output.per_pixel else value
            for output, value in zip(self.outputs, found, strict=True)
        )
        return sized[0] if len(sized) == 1 else sized
