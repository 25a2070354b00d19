"""The micro-batch that fits into a memory, from the bytes that two images of the task itself keep. Imports torch."""

from __future__ import annotations

from finetune.__main__ import CheckedRun
from launch.init.machine import Target
from launch.init.text import Choice
from launch.plan.memory import RESERVE, LiveBytes
from pretrain.core.machine.resources import size_text

_FREE = 0.8  # share of the memory that is used: the estimate is not exact
_IMAGES = 2  # a batch norm needs more than one


def accumulation(checked: CheckedRun, where: Target) -> Choice:
    """`engine.accumulation_steps`, so that a micro-batch fits.

    Raises:
        ConfigError: the task cannot be built. ValueError: not one image fits.
    """
    state, image = _measured(checked)
    batch = checked.config.optim.global_batch_size
    fits = int((_FREE * where.memory - RESERVE - state) // image)
    parts = next((parts for parts in range(1, batch + 1) if batch % parts == 0 and batch // parts <= fits), None)
    need = f"about {size_text(image)} an image, measured on {_IMAGES}, and {size_text(state)} of weights and optimizer"
    if parts is None:
        raise ValueError(
            f"{where.name}: an image does not fit into {size_text(where.memory)} ({need}): choose smaller weights, or "
            "a smaller task.size or task.crop, for instance task.size=512"
        )
    why = f"A step keeps {need}; {size_text(where.memory)} of {where.name} hold {batch // parts} images at a time."
    return Choice("engine.accumulation_steps", parts, why)


def _measured(checked: CheckedRun) -> tuple[int, int]:
    """(bytes of weights, gradients and AdamW's state, bytes that an image keeps until the backward pass)."""
    import torch

    from finetune.data.batches import TrainBatches
    from finetune.run import build_task

    config = checked.config
    _, task = build_task(config, checked.train, total_steps=checked.steps.total_steps)
    task.train()
    batches = TrainBatches(
        checked.train,
        task.train_transform(),
        task.collate,
        seed=config.seed,
        global_batch=_IMAGES,
        micro_batch=_IMAGES,
        rank=0,
        world_size=1,
        noises=task.noises,
        first=0,
    )
    batch = batches[0]
    batch.pop("bad", None)
    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=config.engine.precision != "fp32")
    with LiveBytes(real=True) as memory, bf16:
        losses = task(batch, 0)
    del losses
    trained = sum(parameter.nbytes for parameter in task.parameters() if parameter.requires_grad)
    kept = sum(tensor.nbytes for tensor in task.state_dict().values())
    return kept + 3 * trained, max(1, memory.peak // _IMAGES)
