"""The training loader: positions to host batches, decoded and cropped in workers, joined in order.

A host batch of b samples is a dict:

    "position"       int64   [b]
    "<view>"         uint8   [b, n, C, H, W], channels last in memory; float32 from 0 to 255 with a `value_range`
    "<view>.params"  float32 [b, n, NUM_PARAMS], see specs.Param
    "<noise>"        float32 [b, *shape]
    "<mask>"         bool or int64 [b, ...], see masks.py
    "bad"            list of substitute.BadRecord

With `augment_on="worker"` the views are float32, as returned by `augment.apply`, without parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing

from pretrain.data.loader.microbatch import HostBatch, MicroBatches
from pretrain.data.loader.spec import LoaderSpec
from pretrain.data.loader.workers import run_in_workers
from pretrain.data.sampling.bad_samples import BadSamples
from pretrain.data.shards.dataset import Dataset

Loader = Generator[HostBatch, None, None]


def make_loader(
    dataset: Dataset,
    spec: LoaderSpec,
    *,
    num_steps: int,
    num_workers: int = 0,
    bad_samples: BadSamples | None = None,
    prefetch_factor: int = 2,
    pin_memory: bool = False,
    give_up: Callable[[], bool] | None = None,
) -> Loader:
    """This rank's micro-batches of `num_steps` steps from the spec's start position, `spec.accumulation` per step.

    give_up      asked while a batch is waited for; if it is true, StoppedWaitingError
    bad_samples  counts and records the replaced samples; may stop the run

    Its close() ends the workers; so does exhausting it.

    Raises, while iterating, ValueError for a stage that drops or adds samples, a position without a usable substitute,
    and too many bad samples; RuntimeError when a worker died.
    """
    batches = run_in_workers(
        MicroBatches(dataset, spec),
        max(0, num_steps) * spec.accumulation,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor,
        pin_memory=pin_memory,
        give_up=give_up,
    )
    return batches if bad_samples is None else _observed(batches, bad_samples)


def _observed(batches: Loader, bad_samples: BadSamples) -> Loader:
    with closing(batches):
        for batch in batches:
            bad_samples.observe(len(batch["position"]), batch["bad"])
            yield batch
