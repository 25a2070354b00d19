"""Bytes of a fine-tuning run's checkpoint and micro-batch, measured on the task itself.

Imports torch and reads the initial weights; nothing here uses a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.config import FinetuneConfig
from finetune.data.examples import Examples
from pretrain.engine.plan import Plan


@dataclass(frozen=True)
class TaskCost:
    """Bytes. checkpoint: weights, averages and optimizer state. batch: a micro-batch as a worker sends it."""

    checkpoint: int
    batch: int


def count(config: FinetuneConfig, train: Examples, plan: Plan) -> TaskCost:
    """Build the task and transform one of its images.

    Raises:
        ConfigError: the weights cannot be read, or do not fit the task.
        ValueError: the image cannot be decoded.
    """
    from finetune.run import build_task
    from launch.plan.memory import OPTIMIZER_BYTES

    _, task = build_task(config, train, total_steps=plan.total_steps)
    kept = sum(_bytes(value) for value in task.state_dict().values())
    trained = sum(parameter.numel() for parameter in task.parameters() if parameter.requires_grad)
    sample = task.train_transform()(train[0], np.random.default_rng(0))
    return TaskCost(kept + trained * OPTIMIZER_BYTES[config.optim.name], _bytes(sample) * plan.micro_batch)


def _bytes(value: Any) -> int:
    """Bytes of the tensors and arrays in nested dictionaries and lists."""
    if isinstance(value, dict):
        return sum(_bytes(inner) for inner in value.values())
    if isinstance(value, list | tuple):
        return sum(_bytes(inner) for inner in value)
    return int(getattr(value, "nbytes", 0))
