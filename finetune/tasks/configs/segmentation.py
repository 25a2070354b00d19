"""Configuration of the task segmentation. No torch here."""

from __future__ import annotations

from typing import Literal

from finetune.tasks.configs.section import TaskSection


class SegmentationConfig(TaskSection):
    """The task segmentation."""

    name: Literal["segmentation"] = "segmentation"
