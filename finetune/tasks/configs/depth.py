"""Configuration of the task depth. No torch here."""

from __future__ import annotations

from typing import Literal

from finetune.tasks.configs.section import TaskSection


class DepthConfig(TaskSection):
    """The task depth."""

    name: Literal["depth"] = "depth"
