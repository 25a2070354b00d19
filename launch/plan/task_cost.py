"""Bytes of a fine-tuning run's checkpoint and micro-batch, measured on the task itself.

Imports torch and reads the initial weights; nothing here uses a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    from finetune.loader import batch_bytes
    from finetune.run import build_task
    from pretrain.engine.session.needs import checkpoint_bytes

    _, task = build_task(config, train, total_steps=plan.total_steps)
    batch = batch_bytes(task, train, plan.micro_batch)
    return TaskCost(checkpoint_bytes(task, config.optim), batch)
