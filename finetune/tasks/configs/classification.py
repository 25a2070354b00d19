"""Configuration of the task classification. No torch here."""

from __future__ import annotations

from typing import Literal

from finetune.tasks.configs.section import TaskSection


class ClassificationConfig(TaskSection):
    """The task classification."""

    name: Literal["classification"] = "classification"
