"""A graph compared with its task on photos, as tasks are measured: the numbers of both, at three sizes.

Random pixels hold no objects: the boxes that a detector chooses on them say nothing about those on photos.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from finetune.data.examples import Examples
from finetune.data.subset import Subset
from finetune.evaluate import evaluate
from finetune.export.graph import Graph
from finetune.export.quantize import with_graph
from finetune.metrics.metric import Scores
from finetune.tasks.base import Task
from pretrain.core.distributed import World
from pretrain.models.export.graph import Run, Size

SCALES = (0.75, 1.0, 1.5)  # of the sides of the task's images
ALLOWED = 0.005  # difference of the primary number: a rounding may change the order of two objects
BATCH = 2
Numbers = dict[str, float]


@dataclass(frozen=True)
class ImagesCheck:
    """The numbers of a graph and of its task on `images` photos, each at `size`; the first is the primary one."""

    size: Size
    images: int
    graph: Numbers
    task: Numbers

    def __str__(self) -> str:
        name, (height, width) = next(iter(self.task)), self.size
        numbers = f"{name} {self.graph[name]:.4f}, the task's {self.task[name]:.4f}"
        return f"{self.images} photos at {height} x {width}: {numbers}"

    def facts(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return {"size": list(self.size), "images": self.images, "graph": self.graph, "task": self.task}


class OnImages:
    """Photos on which graphs of a task are compared with it.

    Args:
        graph: of the task. size: (height, width) of the task's images in whole patches. count: of photos, evenly spaced
            in `examples`.
    """

    def __init__(self, task: Task, graph: Graph, size: Size, examples: Examples, count: int):
        self.task, self.graph, self.size = task, graph, size
        number = min(count, len(examples))
        self.examples = Subset(examples, np.linspace(0, len(examples) - 1, number).round().astype(np.int64))
        self._own: dict[Size, Numbers] = {}

    @property
    def sizes(self) -> Sequence[Size]:
        """The three sizes of images, or the one that the graph is fixed to."""
        if self.graph.fixed is not None:
            return (self.size,)
        patch, least = self.graph.patch, self.graph.min_patches
        sides = [[max(round(side * scale / patch), least) * patch for side in self.size] for scale in SCALES]
        return tuple(dict.fromkeys((height, width) for height, width in sides))

    def compare(self, run: Run) -> list[ImagesCheck]:
        """Of the opened graph.

        Raises:
            SizeError: a photo, or the last of its windows, has a size that the graph does not accept.
            ValueError: the primary number differs by more than ALLOWED.
        """
        graph, checks = self.graph, []
        fixed, smallest = None if graph.fixed is None else self.size, graph.min_patches * graph.patch
        for size in self.sizes:
            sized = self.task.at_size(size)
            if size not in self._own:
                self._own[size] = self._measure(sized)
            found = self._measure(with_graph(sized, run, patch=graph.patch, fixed=fixed, smallest=smallest))
            checks.append(ImagesCheck(size, len(self.examples), found, self._own[size]))
            name, own = next(iter(self._own[size].items()))
            if not abs(found[name] - own) <= ALLOWED * max(1.0, abs(own)):  # also of NaN
                raise ValueError(f"{checks[-1]}; a difference of {ALLOWED} is allowed")
        return checks

    def first(self) -> tuple[torch.Tensor, ...]:
        """The inputs of the graph for a photo, at its size: a detector is slower where there are objects."""
        photo = torch.from_numpy(self.examples[0].image).permute(2, 0, 1)[None].float() / 255
        return self.graph.inputs(F.interpolate(photo, self.size, mode="bilinear", antialias=True))

    def _measure(self, task: Task) -> Numbers:
        return numbers(measured(task, self.examples, BATCH))


def measured(task: Task, examples: Examples, batch_size: int) -> Scores:
    """The numbers of a task on examples, in this process on the CPU."""
    alone = World(0, 1, 0, torch.device("cpu"))
    return evaluate(task, examples, world=alone, batch_size=batch_size).scores


def numbers(scores: Scores) -> Numbers:
    """As plain numbers, the primary one first."""
    return {name: float(value) for name, value in scores.values.items()}
