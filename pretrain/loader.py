"""The batches of a run on the device, from its current step; records bad samples and measures the waiting time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from pretrain.config import Plan, PretrainConfig, batch_bytes
from pretrain.core.distributed import World
from pretrain.data.loader.microbatch import MicroBatches
from pretrain.data.loader.pipeline import make_loader
from pretrain.data.loader.spec import LoaderSpec
from pretrain.data.sampling.bad_samples import BadList, BadSamples
from pretrain.data.sampling.mixture import MixedOrder
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.reader import open_limit
from pretrain.data.views import augment
from pretrain.engine.session.needs import Reading


class PretrainLoader:
    """Iterates over this rank's micro-batches from `start_step` on.

    Attributes:
        latest: the latest micro-batch.
        waited: total seconds spent waiting for the loader.
        bad: counts of unusable samples on this rank.
    """

    def __init__(
        self,
        config: PretrainConfig,
        steps: Plan,
        dataset: Dataset,
        world: World,
        *,
        start_step: int,
        say: Callable[[str], None],
        skipped_positions: Mapping[int, int] | None = None,
        give_up: Callable[[], bool] | None = None,
    ):
        self.views = config.objective.views(config.model)
        self.latest: dict[str, Tensor] = {}
        self.waited = 0.0
        self._config, self._dataset, self._device = config, dataset, world.device
        spec = loader_spec(config, rank=world.rank, world_size=world.world_size, skipped_positions=skipped_positions)
        self._micro_batches = MicroBatches(dataset, spec)
        listed = BadList(Path(config.run_dir), rank=world.rank, say=say)
        self.bad = BadSamples(config.data.max_bad_fraction, record=listed.add, known=listed.known())
        on_gpu = world.device.type == "cuda"
        self._loader = make_loader(
            dataset,
            replace(
                spec,
                start_position=start_step * spec.global_batch,
                # Without a GPU, colour augmentation costs the same in a worker, and the step does not wait for it.
                augment_on="device" if on_gpu or not config.data.num_workers else "worker",
            ),
            num_steps=steps.total_steps - start_step,
            num_workers=config.data.num_workers,
            bad_samples=self.bad,
            prefetch_factor=config.data.prefetch,
            pin_memory=on_gpu,
            give_up=give_up,
        )

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            asked = time.perf_counter()
            host_batch = next(self._loader, None)
            self.waited += time.perf_counter() - asked
            if host_batch is None:
                return
            self.latest = augment.apply(self.views, host_batch, self._config.mean, self._config.std, self._device)
            yield self.latest

    def again(self, step: int, micro: int) -> dict[str, Tensor]:
        """Micro-batch `micro` of this rank in the step after `step` completed ones, read again."""
        host_batch = self._micro_batches[step * self._micro_batches.spec.accumulation + micro]
        return augment.apply(self.views, host_batch, self._config.mean, self._config.std, self._device)

    def taken(self, step: int) -> dict[str, float]:
        """Samples of each set of a mixture in the first `step` steps of the run, "samples/NAME"; empty without one."""
        order = self._micro_batches.order
        if not isinstance(order, MixedOrder):
            return {}
        taken = order.taken(step * self._micro_batches.spec.global_batch)
        return {f"samples/{name}": float(count) for name, count in zip(order.mixture.names, taken, strict=True)}

    def close(self) -> None:
        """Stop the worker processes."""
        self._loader.close()

    def names(self, positions: Sequence[int]) -> list[str]:
        """ "shard/key" of the samples at `positions`."""
        order, reader = self._micro_batches.order, self._micro_batches.reader
        located = order.at_many(np.asarray(positions, dtype=np.int64))
        places = zip(located.shard.tolist(), located.sample.tolist(), strict=True)
        return [f"{self._dataset.names[shard]}/{reader.key(shard, sample)}" for shard, sample in places]


def reading_of(config: PretrainConfig, steps: Plan, dataset: Dataset, *, augmented: bool) -> Reading:
    """How one rank reads its data. augmented: workers send augmented views, in float32."""
    batch = batch_bytes(config, steps.micro_batch, augmented=augmented)
    shards = min(len(dataset.names), open_limit(dataset, config.data.block_shards))
    return Reading(1, config.data.num_workers, config.data.prefetch, batch, open_shards=shards)


def loader_spec(
    config: PretrainConfig, *, rank: int, world_size: int, skipped_positions: Mapping[int, int] | None = None
) -> LoaderSpec:
    """Specification of the micro-batches of one rank, from the first step of the run."""
    return LoaderSpec(
        views=config.objective.views(config.model),
        in_chans=config.model.in_chans,
        mean=config.mean,
        std=config.std,
        seed=config.seed,
        block_shards=config.data.block_shards,
        global_batch=config.optim.global_batch_size,
        micro_batch=config.optim.global_batch_size // (world_size * config.engine.accumulation_steps),
        rank=rank,
        world_size=world_size,
        skipped_positions=dict(skipped_positions or {}),
        orientation=config.data.orientation,
        value_range=config.data.range,
        max_pixels=config.data.max_pixels,
    )
