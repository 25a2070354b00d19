"""Configuration of the task detection. No torch here."""

from __future__ import annotations

from typing import Literal

from finetune.tasks.configs.section import TaskSection


class DetectionConfig(TaskSection):
    """The task detection."""

    name: Literal["detection"] = "detection"
