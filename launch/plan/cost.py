"""The cost of a step, counted on tensors without storage: operations, memory, bytes of a batch and of a checkpoint.

Imports torch when it counts, and takes seconds; nothing here uses a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.config import PretrainConfig
from pretrain.engine.optim.table import KINDS


@dataclass(frozen=True)
class Cost:
    """Of one configuration.

    Attributes:
        flops: of one image in a step, forward and backward (twice with optim.sam), products and convolutions only.
        trained: bytes of the trained parameters in fp32. fixed: of the rest of the state (averages).
        per_batch, per_image: bytes that a micro-batch keeps alive: per_batch + per_image * images.
        optimizer: bytes of the optimizer's state. checkpoint: of one checkpoint: weights, averages, optimizer.
    """

    flops: float
    trained: int
    fixed: int
    per_batch: int
    per_image: int
    optimizer: int
    checkpoint: int


def count(config: PretrainConfig) -> Cost:
    """Count a step of this configuration.

    Raises:
        ConfigError: initial weights or a teacher (init, a tokenizer) cannot be read.
    """
    from launch.plan.memory import footprint

    found = footprint(config)
    weights = found.trained * (2 if KINDS[config.optim.name].averages else 1)
    checkpoint = weights + found.fixed + found.optimizer
    passes = 1 if config.optim.sam is None else 2
    return Cost(
        passes * _flops(config),
        found.trained,
        found.fixed,
        found.per_batch,
        found.per_image,
        found.optimizer,
        checkpoint,
    )


def _flops(config: PretrainConfig, images: int = 2) -> float:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    from launch.plan.memory import empty_batch
    from pretrain.models.layers import attention
    from pretrain.objectives.base import Horizon
    from pretrain.start import build_objective

    with torch.device("meta"):
        objective = build_objective(config, Horizon(total_steps=1000, steps_per_epoch=100))
    chosen = attention.choose
    attention.choose = lambda *_: "bmm"  # its products are counted; the fused kernel of a CPU has no formula
    try:
        counter = FlopCounterMode(display=False)
        with FakeTensorMode(allow_non_fake_inputs=True), counter:
            objective.to_empty(device="cpu")
            objective(empty_batch(config, images), 0)["loss"].backward()
    finally:
        attention.choose = chosen
    return counter.get_total_flops() / images
