"""One micro-batch: a pure function of its number, whoever computes it.

Its samples are found by the order, read, passed through the user's stages, decoded, and cropped to uint8 views; the
random numbers are keyed by position. So the number of ranks and workers, a kill and a resume change nothing in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.data.sampling import keyed
from pretrain.data.sampling.order import Order, rank_positions
from pretrain.data.sampling.substitute import MAX_SUBSTITUTES, BadRecord, candidates
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.reader import BadSample, Reader
from pretrain.data.views import augment, crops, maskdraw
from pretrain.data.views.decode import IMAGE_EXTENSIONS, DecodeError, decode_sample
from pretrain.data.views.specs import InputSpec, Mask, Noise, ViewSpec, stacks

Sample = dict[str, Any]
Stage = Callable[[Iterable[Sample]], Iterable[Sample]]
HostBatch = dict[str, Any]


@dataclass(frozen=True)
class MicroBatches:
    """Item i is micro-batch i of this rank, counted from `start_position`; see pipeline.py for what it holds."""

    dataset: Dataset
    order: Order
    specs: tuple[InputSpec, ...]
    in_chans: int
    start_position: int
    global_batch: int
    micro_batch: int
    rank: int
    world: int
    stages: tuple[Stage, ...] = ()
    normalize: tuple[Sequence[float], Sequence[float]] | None = None  # mean and std: augment here, not on the device
    passed_over: Mapping[int, int] = field(
        default_factory=dict
    )  # position: how many of its candidates, own sample first
    reader: Reader = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reader", Reader(self.dataset))

    @property
    def accumulation(self) -> int:
        """Micro-batches of this rank in one step."""
        return self.global_batch // self.world // self.micro_batch

    def positions(self, index: int) -> np.ndarray:
        """Sample positions of micro-batch `index`, int64 [micro_batch]: a contiguous piece of the rank's slice."""
        step, micro = divmod(index, self.accumulation)
        first = rank_positions(step, self.global_batch, self.rank, self.world)[micro * self.micro_batch]
        return self.start_position + np.arange(first, first + self.micro_batch)

    def _place(self, index: int) -> maskdraw.BatchPosition:
        return maskdraw.BatchPosition(
            seed=self.order.seed,
            positions=self.positions(index),
            first=self.start_position + index // self.accumulation * self.global_batch,
            global_batch=self.global_batch,
            epoch_length=self.dataset.num_samples,
        )

    def __getitem__(self, index: int) -> HostBatch:
        positions = self.positions(index).tolist()
        bad: list[BadRecord] = []
        entries = [_Entry(name, views, self.micro_batch, self.in_chans) for name, views in stacks(self.specs).items()]
        for row, (position, image) in enumerate(zip(positions, self._images(positions, bad), strict=True)):
            pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
            for entry in entries:
                entry.crop(row, pixels, self.order.seed, position)
        batch: HostBatch = {"position": torch.tensor(positions), "bad": bad}
        for entry in entries:
            batch[entry.name] = entry.images
            batch[f"{entry.name}.params"] = entry.params()
        for spec in self.specs:
            if isinstance(spec, Noise):
                batch[spec.name] = _noise(spec, self.order.seed, positions)
            elif isinstance(spec, Mask):
                drawn = maskdraw.draw(spec, self._place(index))
                batch |= {name: torch.from_numpy(array) for name, array in drawn.items()}
        if self.normalize is not None:
            batch = {"bad": bad, **augment.apply(self.specs, batch, *self.normalize, "cpu")}
        return batch

    def _images(self, positions: list[int], bad: list[BadRecord]) -> Iterator[np.ndarray]:
        """One image [H, W, C] per position: the sample's own, or that of a substitute, with the reasons in `bad`."""
        located = self.order.at_many(np.array(positions))
        own = zip(located.shard.tolist(), located.sample.tolist(), strict=True)
        sources = {
            position: _Source(self, position, place, bad) for position, place in zip(positions, own, strict=True)
        }
        samples = _through_stages(self.stages, (source.read() for source in sources.values()), len(positions))
        for source, sample in zip(sources.values(), samples, strict=True):
            yield source.decode(sample)


class _Source:
    """What fills one position: its own sample, or the first of its substitutes that can be read and decoded."""

    def __init__(self, of: MicroBatches, position: int, place: tuple[int, int], bad: list[BadRecord]) -> None:
        self.of = of
        self.position = position
        self.places = chain([place], candidates(of.dataset.counts, of.order.seed, position, place))
        self.bad = bad
        self.failed: list[BadRecord] = []
        self.name = ("", "")
        for shard, index in islice(self.places, of.passed_over.get(position, 0)):
            self.name = (of.dataset.names[shard], of.reader.key(shard, index))
            self._fail("passed over: the run went back from a batch with it", passed_over=True)

    def read(self) -> Sample:
        only = None if self.of.stages else IMAGE_EXTENSIONS
        for shard, index in self.places:
            try:
                sample = self.of.reader.read(shard, index, only=only)
            except BadSample as error:
                self.name = (error.shard, error.key)
                self._fail(f"{error.member}: {error.reason}" if error.member else error.reason)
                continue
            self.name = (self.of.dataset.names[shard], sample["__key__"])
            return sample
        first = self.failed[0]
        raise ValueError(
            f"position {self.position}: {first['shard']}/{first['key']} cannot be used ({first['reason']}), nor can "
            f"its {MAX_SUBSTITUTES} substitutes; check the shards with `fovea data verify`"
        )

    def decode(self, sample: Sample) -> np.ndarray:
        while True:
            try:
                image = decode_sample(sample, self.of.in_chans)
            except DecodeError as error:
                self._fail(str(error))
                (sample,) = _through_stages(self.of.stages, (self.read() for _ in range(1)), 1)
                continue
            for record in self.failed:
                record["substitute"] = "/".join(self.name)
            return image

    def _fail(self, reason: str, *, passed_over: bool = False) -> None:
        shard, key = self.name
        record = BadRecord(
            position=self.position, shard=shard, key=key, reason=reason, substitute="", passed_over=passed_over
        )
        self.failed.append(record)
        self.bad.append(record)


class _Entry:
    """The instances of one name in the batch: their pixels, and the uniforms of their colours."""

    def __init__(self, name: str, views: list[tuple[int, ViewSpec]], batch: int, channels: int) -> None:
        self.name = name
        self.views = views
        count = sum(view.count for _, view in views)
        height, width = views[0][1].size
        pixels = torch.empty((batch, count, height, width, channels), dtype=torch.uint8)
        self.images = pixels.permute(0, 1, 4, 2, 3)
        self.uniforms = np.empty((batch, count, crops.UNIFORMS))

    def crop(self, row: int, image: Tensor, seed: int, position: int) -> None:
        """Cut all instances of one sample from its `image` uint8 [1, C, H, W]."""
        slot = 0
        for index, view in self.views:
            uniforms = keyed.generator(seed, position, keyed.view_purpose(index)).random((view.count, crops.UNIFORMS))
            self.uniforms[row, slot : slot + view.count] = uniforms
            for numbers in uniforms[:, : crops.BOX_UNIFORMS].tolist():
                box = crops.crop_box(numbers, image.shape[2], image.shape[3], view.scale, view.ratio)
                crops.resize_into(self.images[row, slot : slot + 1], image, box, view.interpolation)
                slot += 1

    def params(self) -> Tensor:
        starts = np.cumsum([view.count for _, view in self.views])[:-1]
        parts = np.split(self.uniforms, starts, axis=1)
        made = [crops.colour_params(part, view) for part, (_, view) in zip(parts, self.views, strict=True)]
        return torch.from_numpy(np.concatenate(made, axis=1))


def _noise(spec: Noise, seed: int, positions: list[int]) -> Tensor:
    purpose = keyed.noise_purpose(spec.name)
    rows = [keyed.generator(seed, position, purpose).random(spec.shape, dtype=np.float32) for position in positions]
    return torch.from_numpy(np.stack(rows))


def _through_stages(stages: Sequence[Stage], samples: Iterable[Sample], expected: int) -> Iterable[Sample]:
    for stage in stages:
        samples = _counted(stage, samples, expected)
    return samples


def _counted(stage: Stage, samples: Iterable[Sample], expected: int) -> Iterator[Sample]:
    count = 0
    for sample in stage(samples):
        count += 1
        if count <= expected:
            yield sample
    if count != expected:
        name = getattr(stage, "__qualname__", repr(stage))
        raise ValueError(f"stage {name} gave {count} samples for {expected}; it must give one for each it takes")
