"""Batches of examples: pure functions of their number, in whichever process they are computed.

In training the examples of a micro-batch and all its random numbers are keyed by position: the number of ranks and
workers, a kill and a resume change nothing. In evaluation the complete set is cut into batches, which are distributed
over the ranks: the result for an image does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.data.examples import BadExample, Example, Examples
from pretrain.data.sampling import keyed
from pretrain.data.sampling.bad_samples import MAX_SUBSTITUTES, BadRecord, candidates
from pretrain.data.sampling.order import Order, rank_positions

Sample = dict[str, Any]
Batch = dict[str, Any]
TrainTransform = Callable[[Example, np.random.Generator], Sample]
EvalTransform = Callable[[Example], Sample]
Collate = Callable[[list[Sample]], Batch]
Failure = tuple[int, str, str]  # number of an example, its name, the reason

STEP_NUMBERS = 64  # uniform random numbers of a step, the same on every rank
_TRANSFORM = keyed.view_purpose(0)
_STEP = keyed.noise_purpose("rng_step")


def collate(samples: list[Sample]) -> Batch:
    """A batch of the samples' entries: tensors of one shape are stacked, anything else becomes a list."""
    batch: Batch = {}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        same = all(isinstance(v, Tensor) and v.shape == values[0].shape and v.dtype == values[0].dtype for v in values)
        batch[key] = torch.stack(values) if same else values
    return batch


def move(value: Any, device: torch.device | str) -> Any:
    """The tensors inside a batch, on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: move(inner, device) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [move(inner, device) for inner in value]
    return value


class TrainBatches:
    """Item i is this rank's micro-batch `first` + i.

    It holds the result of `collate_samples`, "position" int64 [b], "rng_step" float32 [64], each of `noises` float32
    [b, *shape], and "bad", a list of `BadRecord`, which is not for the model.

    Args:
        transform: of an example, with a generator keyed by (seed, position).
        global_batch: of a step over all ranks. micro_batch: of this rank at a time.
        noises: shapes of the uniform random numbers that the task reads, keyed by position.
        first: number of micro-batches that this rank has already done.
    """

    def __init__(
        self,
        examples: Examples,
        transform: TrainTransform,
        collate_samples: Collate,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        noises: Mapping[str, Sequence[int]] | None = None,
        first: int = 0,
    ) -> None:
        if not len(examples):
            raise ValueError("the training set has no examples")
        self.examples, self.transform, self.collate_samples = examples, transform, collate_samples
        self.order = Order(np.array([len(examples)]), seed, block_shards=1)
        self.seed, self.global_batch, self.micro_batch = seed, global_batch, micro_batch
        self.rank, self.world_size, self.first = rank, world_size, first
        self.noises = {name: tuple(shape) for name, shape in (noises or {}).items()}
        self.accumulation = global_batch // world_size // micro_batch

    def __getitem__(self, index: int) -> Batch:
        step, micro = divmod(self.first + index, self.accumulation)
        begin = rank_positions(step, self.global_batch, self.rank, self.world_size)[micro * self.micro_batch]
        positions = list(range(begin, begin + self.micro_batch))
        bad: list[BadRecord] = []
        batch = self.collate_samples([self._sample(position, bad) for position in positions])
        batch["position"] = torch.tensor(positions)
        batch["rng_step"] = torch.from_numpy(_uniforms(self.seed, step, _STEP, (STEP_NUMBERS,)))
        for name, shape in self.noises.items():
            purpose = keyed.noise_purpose(name)
            rows = [_uniforms(self.seed, position, purpose, shape) for position in positions]
            batch[name] = torch.from_numpy(np.stack(rows))
        return {**batch, "bad": bad}

    def _sample(self, position: int, bad: list[BadRecord]) -> Sample:
        """The example of a position, or the first of its substitutes that can be read."""
        own = self.order.at(position)[2]
        failed: list[BadRecord] = []
        for index in chain([own], (i for _, i in candidates(self.order.counts, self.seed, position, (0, own)))):
            try:
                example = self.examples[index]
                sample = self.transform(example, keyed.generator(self.seed, position, _TRANSFORM))
            except BadExample as error:
                folder, _, key = error.name.rpartition("/")
                failed.append(BadRecord(position=position, shard=folder or ".", key=key, reason=error.reason,
                                        substitute="", passed_over=False))  # fmt: skip
                continue
            for record in failed:
                record["substitute"] = example.name
            bad += failed
            return sample
        first = failed[0]
        raise ValueError(
            f"position {position}: {first['shard']}/{first['key']} cannot be used ({first['reason']}), nor can its "
            f"{MAX_SUBSTITUTES} substitutes; check the images of data.train"
        )


class EvalBatches:
    """Item i is batch `rank` + i * `world_size` of the set: (batch, examples, failures).

    The batch holds "index" int64 [b], numbers of the examples; it is None when all of them failed. The examples have
    no pixels (see `Example.without_pixels`). Failures are (number, name, reason) of examples that cannot be decoded.
    """

    def __init__(
        self,
        examples: Examples,
        transform: EvalTransform,
        collate_samples: Collate,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: expected at least 1")
        self.examples, self.transform, self.collate_samples = examples, transform, collate_samples
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size

    def __len__(self) -> int:
        """Number of batches of this rank."""
        count = -(-len(self.examples) // self.batch_size)
        return len(range(self.rank, count, self.world_size))

    def __getitem__(self, index: int) -> tuple[Batch | None, list[Example], list[Failure]]:
        begin = (self.rank + index * self.world_size) * self.batch_size
        samples, kept, numbers, failed = [], [], [], []
        for number in range(begin, min(begin + self.batch_size, len(self.examples))):
            try:
                example = self.examples[number]
                samples.append(self.transform(example))
            except BadExample as error:
                failed.append((number, error.name, error.reason))
                continue
            kept.append(example.without_pixels())
            numbers.append(number)
        if not samples:
            return None, [], failed
        return {**self.collate_samples(samples), "index": torch.tensor(numbers)}, kept, failed


def _uniforms(seed: int, position: int, purpose: int, shape: tuple[int, ...]) -> np.ndarray:
    """float32 in [0, 1)."""
    return keyed.generator(seed, position, purpose).random(shape, dtype=np.float32)
