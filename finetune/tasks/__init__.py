"""The table of tasks. A new one is a file, a section in `configs`, and a line here; nothing here imports torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

from pretrain.core.configlib import ConfigError

if TYPE_CHECKING:
    from finetune.data.examples import Examples
    from finetune.data.reading import Reading
    from finetune.predictions import Classes
    from finetune.tasks.base import Task
    from finetune.tasks.configs import TaskSection


class TaskEntry(NamedTuple):
    """Module and class of a task (a `Task`), and the module whose `open_examples` reads its data (without torch)."""

    module: str
    class_name: str
    data: str


TASKS = {
    "classification": TaskEntry("finetune.tasks.classification", "Classification", "finetune.data.classification"),
    "multi_label": TaskEntry("finetune.tasks.multi_label", "MultiLabel", "finetune.data.multi_label"),
    "detection": TaskEntry("finetune.tasks.detection", "Detection", "finetune.data.coco.examples"),
    "segmentation": TaskEntry("finetune.tasks.segmentation", "Segmentation", "finetune.data.maps.masks"),
    "depth": TaskEntry("finetune.tasks.depth", "Depth", "finetune.data.maps.depth"),
}


def task_class(name: str) -> type[Task]:
    """The class of task `name`. Imports torch."""
    return getattr(importlib.import_module(_entry(name).module), _entry(name).class_name)


def open_examples(
    section: TaskSection, source: Any, *, classes: Classes | None = None, reading: Reading | None = None
) -> Examples:
    """The examples of a `finetune.config.DataSource` for a task, or the subset that it selects.

    Each data module has a function with this name and these arguments; the subset is selected here.

    Args:
        classes: of the training set, which the labels of another set must belong to; None: read from the source.
        reading: of the images; None: 8-bit RGB.

    Raises:
        ValueError: the source cannot be read, or its classes differ.
    """
    from finetune.data.reading import PHOTOS
    from finetune.data.subset import subset

    name: str = section.name  # pyright: ignore[reportAttributeAccessIssue]
    reader = importlib.import_module(_entry(name).data).open_examples
    return subset(reader(section, source, classes=classes, reading=reading or PHOTOS), source)


def _entry(name: str) -> TaskEntry:
    if name not in TASKS:
        raise ConfigError("task.name", [f"unknown task {name!r}; one of {', '.join(TASKS)}"])
    return TASKS[name]
