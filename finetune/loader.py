"""The batches of a run, on the device: they start at its current step, record bad images and measure waiting time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np

from finetune.config import FinetuneConfig
from finetune.data.batches import TrainBatches, move
from finetune.data.examples import BadExample, Examples
from finetune.tasks.base import Task
from pretrain.core.distributed import World
from pretrain.data.loader.workers import run_in_workers
from pretrain.data.sampling.bad_samples import BadList, BadSamples
from pretrain.engine.plan import Plan
from pretrain.engine.session.needs import Reading

_TRIED = 16  # examples, of which one must be readable


class FinetuneLoader:
    """Iterate over this rank's micro-batches, starting at `start_step`.

    Attributes:
        waited: total seconds spent waiting for the readers.
        bad: counts of unusable images on this rank.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        steps: Plan,
        task: Task,
        examples: Examples,
        world: World,
        *,
        start_step: int,
        say: Callable[[str], None],
        give_up: Callable[[], bool] | None = None,
    ):
        self.waited = 0.0
        self._device = world.device
        accumulation = config.engine.accumulation_steps
        batches = TrainBatches(
            examples,
            task.train_transform(),
            task.collate,
            seed=config.seed,
            global_batch=config.optim.global_batch_size,
            micro_batch=steps.micro_batch,
            rank=world.rank,
            world_size=world.world_size,
            noises=task.noises,
            first=start_step * accumulation,
        )
        listed = BadList(Path(config.run_dir), rank=world.rank, say=say)
        self.bad = BadSamples(config.data.max_bad_fraction, record=listed.add, known=listed.known())
        self._micro_batch = steps.micro_batch
        self._loader = run_in_workers(
            batches,
            (steps.total_steps - start_step) * accumulation,
            num_workers=config.data.num_workers,
            prefetch_factor=config.data.prefetch,
            pin_memory=world.device.type == "cuda",
            give_up=give_up,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            start = time.perf_counter()
            batch = next(self._loader, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            self.bad.observe(self._micro_batch, batch.pop("bad"))
            yield move(batch, self._device)

    def close(self) -> None:
        """Stop the reading processes."""
        self._loader.close()


def reading_of(config: FinetuneConfig, task: Task, examples: Examples, steps: Plan) -> Reading:
    """How one rank reads its data."""
    batch = batch_bytes(task, examples, steps.micro_batch)
    return Reading(1, config.data.num_workers, config.data.prefetch, batch)


def batch_bytes(task: Task, examples: Examples, micro_batch: int) -> int:
    """Bytes of a micro-batch as a worker sends it, measured on the first example that can be read; 0: on none."""
    transform = task.train_transform()
    for index in range(min(len(examples), _TRIED)):
        with suppress(BadExample):
            return micro_batch * _bytes(transform(examples[index], np.random.default_rng(0)))
    return 0


def _bytes(value: Any) -> int:
    """Bytes of the tensors and arrays in nested dictionaries and lists."""
    if isinstance(value, dict):
        return sum(map(_bytes, cast(dict[str, Any], value).values()))
    if isinstance(value, list | tuple):
        return sum(map(_bytes, cast(list[Any], value)))
    return int(getattr(value, "nbytes", 0))
