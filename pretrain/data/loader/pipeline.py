"""The training loader: positions to host batches, decoded and cropped in workers, joined in order.

A host batch of b samples is a dict:

    "position"       int64   [b]
    "<view>"         uint8   [b, n, C, H, W], channels last in memory
    "<view>.params"  float32 [b, n, NUM_PARAMS], see specs.Param
    "<noise>"        float32 [b, *shape]
    "<mask>"         bool or int64 [b, ...], see masks.py
    "bad"            list of substitute.BadRecord

With `augment_on="worker"` the views are float32 as `augment.apply` makes them, and come without parameters.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import Literal

from pretrain.data.loader.microbatch import HostBatch, MicroBatches, Stage
from pretrain.data.loader.workers import run_in_workers
from pretrain.data.sampling.order import Order
from pretrain.data.sampling.substitute import BadSamples
from pretrain.data.shards.dataset import Dataset
from pretrain.data.views.specs import InputSpec, check_channels, stacks

Loader = Generator[HostBatch, None, None]


def make_loader(
    dataset: Dataset,
    views: Sequence[InputSpec],
    *,
    in_chans: int,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    block_shards: int,
    global_batch: int,
    micro_batch: int,
    total_steps: int,
    start_step: int = 0,
    start_position: int | None = None,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    augment_on: Literal["device", "worker"] = "device",
    stages: Sequence[Stage] = (),
    passed_over: Mapping[int, int] | None = None,
    bad_samples: BadSamples | None = None,
    prefetch_factor: int = 2,
    pin_memory: bool = False,
) -> Loader:
    """Micro-batches of this rank of steps [start_step, total_steps), global_batch / world / micro_batch a step.

    start_position  samples consumed before start_step; left out, start_step * global_batch
    passed_over     positions that are filled by a substitute, and how many candidates, their own sample first, are not
                    taken
    stages          user code on webdataset sample dicts (bytes by extension, `__key__`) before they are decoded: a
                    generator function that gives one sample for each it takes, in order. It must treat samples one by
                    one, as they come in groups that depend on the number of ranks; with workers it must be importable.
    bad_samples     takes note of what had to be replaced, and may stop the run

    Its close() ends the workers; so does using it up.

    Raises ValueError for sizes that do not divide, for views the channels do not allow, and, while iterating, for a
    stage that drops or adds samples, a position without a usable substitute, and too many bad samples. RuntimeError
    when a worker died.
    """
    micro_batches = make_micro_batches(
        dataset,
        views,
        in_chans=in_chans,
        mean=mean,
        std=std,
        seed=seed,
        block_shards=block_shards,
        global_batch=global_batch,
        micro_batch=micro_batch,
        start_position=start_step * global_batch if start_position is None else start_position,
        rank=rank,
        world=world,
        augment_on=augment_on,
        stages=stages,
        passed_over=passed_over,
    )
    length = max(0, total_steps - start_step) * micro_batches.accumulation
    batches = run_in_workers(
        micro_batches, length, num_workers=num_workers, prefetch_factor=prefetch_factor, pin_memory=pin_memory
    )
    return batches if bad_samples is None else _observed(batches, bad_samples)


def make_micro_batches(
    dataset: Dataset,
    views: Sequence[InputSpec],
    *,
    in_chans: int,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    block_shards: int,
    global_batch: int,
    micro_batch: int,
    start_position: int = 0,
    rank: int = 0,
    world: int = 1,
    augment_on: Literal["device", "worker"] = "device",
    stages: Sequence[Stage] = (),
    passed_over: Mapping[int, int] | None = None,
) -> MicroBatches:
    """What the loader iterates over, to be asked for single micro-batches; see `make_loader`."""
    specs = tuple(views)
    if not stacks(specs):
        raise ValueError("views has no ViewSpec, so there is nothing to load")
    check_channels(specs, in_chans)
    if len(mean) != in_chans or len(std) != in_chans:
        raise ValueError(f"mean has {len(mean)} and std {len(std)} numbers for in_chans={in_chans}")
    if global_batch < 1 or micro_batch < 1 or global_batch % (world * micro_batch):
        raise ValueError(f"global batch size {global_batch} is not a multiple of {world} ranks x {micro_batch} per GPU")
    if augment_on not in ("device", "worker"):
        raise ValueError(f"augment_on must be device or worker, got {augment_on!r}")
    return MicroBatches(
        dataset=dataset,
        order=Order(dataset.counts, seed, block_shards),
        specs=specs,
        in_chans=in_chans,
        start_position=start_position,
        global_batch=global_batch,
        micro_batch=micro_batch,
        rank=rank,
        world=world,
        stages=tuple(stages),
        normalize=(tuple(mean), tuple(std)) if augment_on == "worker" else None,
        passed_over=dict(passed_over or {}),
    )


def _observed(batches: Loader, bad_samples: BadSamples) -> Loader:
    with closing(batches):
        for batch in batches:
            bad_samples.observe(len(batch["position"]), batch["bad"])
            yield batch
