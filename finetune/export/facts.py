"""What export.json says of a graph: inputs, preparation of images, outputs, classes."""

from __future__ import annotations

from typing import Any

from finetune.export.example import mode_of
from finetune.export.graph import Graph
from finetune.tasks.base import Task
from pretrain.core.record import versions
from pretrain.data.views.orientation import recorded_orientation
from pretrain.data.views.values import recorded_range
from pretrain.models.export.graph import Size


def facts_of(task: Task, graph: Graph, size: Size, record: dict[str, Any]) -> dict[str, Any]:
    """Before any file of the graph is compared; `size` is that of the task's images in whole patches."""
    free = graph.fixed is None
    sides = [f"multiple of {graph.patch}"] * 2 if free else list(size)
    count, value_range = task.bare_backbone.in_chans, recorded_range(record)
    channels = "RGB" if count == 3 else f"{count} channels in the order of the training images"
    if value_range is not None:
        channels += ", (v - low) / (high - low) of a stored value v and `range`, clipped"
    preparation = {
        "in_words": task.preparation(),
        "upright": recorded_orientation(record) != "stored",
        "mode": mode_of(count),
        "canvas": list(size),
        "fixed": not free,
        "patch": graph.patch,
        **task.preparation_facts(),
    }
    return {
        "task": task.config.name,
        "source": record.get("source", {}),
        "input": {
            "name": "images",
            "shape": ["batch", len(task.mean), *sides],
            "smallest": [graph.min_patches * graph.patch] * 2 if free else list(size),
            "values": f"float32 pixels in 0 to 1, {channels}; the graph normalizes them",
            "range": value_range,
            "traced_at": list(size),
            "orientation": recorded_orientation(record),
            "preparation": preparation,
        },
        "outputs": graph.names,
        "contents": {output.name: output.content for output in graph.outputs},
        "answer": task.answer_facts(),
        "classes": list(task.classes),
        "category_ids": list(task.classes.category_ids),
        "files": {},
        "on_photos": {},
        "versions": versions(),
    }
