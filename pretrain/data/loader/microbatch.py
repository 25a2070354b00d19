"""One micro-batch: a pure function of its number, on any process.

Its samples are found by the order, read, passed through the user's stages, decoded, and cropped to views in uint8, or
in float32 under a range of values; of a clip only the frames that a view shows are read. Random numbers are keyed by
position: the number of ranks and workers, a kill and a resume do not change it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.data.formats.stored import DecodeError
from pretrain.data.loader.spec import LoaderSpec, Sample, Stage
from pretrain.data.sampling import keyed
from pretrain.data.sampling.bad_samples import MAX_SUBSTITUTES, BadRecord, candidates
from pretrain.data.sampling.order import rank_positions
from pretrain.data.shards.dataset import Dataset, order_of
from pretrain.data.shards.image_files import IMAGE_EXTENSIONS, frame_members
from pretrain.data.shards.reader import BadSample, Reader, open_limit
from pretrain.data.views import augment, clips, crops, maskdraw
from pretrain.data.views.decode import decode_file, decode_sample
from pretrain.data.views.specs import Mask, Noise, ViewSpec, stacks

HostBatch = dict[str, Any]


class MicroBatches:
    """Item i is micro-batch i of the spec's rank, from its start position on; see pipeline.py for its entries."""

    def __init__(self, dataset: Dataset, spec: LoaderSpec) -> None:
        self.dataset, self.spec = dataset, spec
        self.clips = [
            (index, view)
            for index, view in enumerate(spec.views)
            if isinstance(view, ViewSpec) and view.frames and view.same_as is None
        ]
        self.order = order_of(dataset, spec.seed, spec.block_shards, spec.global_batch)
        self.reader = Reader(dataset, max_open=open_limit(dataset, spec.block_shards))

    def positions(self, index: int) -> np.ndarray:
        """Sample positions of micro-batch `index`, int64 [micro_batch]: a contiguous piece of the rank's slice."""
        spec = self.spec
        step, micro = divmod(index, spec.accumulation)
        first = rank_positions(step, spec.global_batch, spec.rank, spec.world_size)[micro * spec.micro_batch]
        return spec.start_position + np.arange(first, first + spec.micro_batch)

    def _batch_position(self, index: int) -> maskdraw.BatchPosition:
        spec = self.spec
        return maskdraw.BatchPosition(
            seed=spec.seed,
            positions=self.positions(index),
            first=spec.start_position + index // spec.accumulation * spec.global_batch,
            global_batch=spec.global_batch,
            epoch_length=self.dataset.num_samples,
        )

    def __getitem__(self, index: int) -> HostBatch:
        spec, positions = self.spec, self.positions(index).tolist()
        bad: list[BadRecord] = []
        dtype = torch.uint8 if spec.value_range is None else torch.float32
        shape = (spec.micro_batch, spec.in_chans)
        entries = [_Entry(name, views, *shape, dtype) for name, views in stacks(spec.views).items()]
        for row, (position, frames) in enumerate(zip(positions, self._frames(positions, bad), strict=True)):
            for entry in entries:
                entry.crop(row, frames, spec.seed, position)
        batch: HostBatch = {"position": torch.tensor(positions), "bad": bad}
        for entry in entries:
            batch[entry.name] = entry.images
            batch[f"{entry.name}.params"] = entry.params()
        for view in spec.views:
            if isinstance(view, Noise):
                first = self._batch_position(index).first
                batch[view.name] = _noise(view, spec.seed, [first] * len(positions) if view.of_step else positions)
            elif isinstance(view, Mask):
                drawn = maskdraw.draw(view, self._batch_position(index))
                batch |= {name: torch.from_numpy(array) for name, array in drawn.items()}
        if spec.augment_on == "worker":
            batch = {"bad": bad, **augment.apply(spec.views, batch, spec.mean, spec.std, "cpu")}
        return batch

    def _frames(self, positions: list[int], bad: list[BadRecord]) -> Iterator[_Frames]:
        """The images of each position: the sample's own, or those of a substitute, with the reasons in `bad`."""
        located = self.order.at_many(np.array(positions))
        own = zip(located.shard.tolist(), located.sample.tolist(), strict=True)
        sources = {
            position: _Source(self, position, place, bad) for position, place in zip(positions, own, strict=True)
        }
        samples = _through_stages(self.spec.stages, (source.read() for source in sources.values()), len(positions))
        for source, sample in zip(sources.values(), samples, strict=True):
            yield source.decode(sample)


@dataclass(frozen=True)
class _Frames:
    """The decoded images of a sample that its views show.

    Attributes:
        total: frames that the sample has; 1 of an image. images: [1, C, H, W] by the frame's number, all of one size.
    """

    total: int
    images: Mapping[int, Tensor]


class _Source:
    """The sample of one position: its own, or the first of its substitutes that can be read and decoded."""

    def __init__(self, of: MicroBatches, position: int, place: tuple[int, int], bad: list[BadRecord]) -> None:
        self.of = of
        self.position = position
        others = candidates(of.dataset.counts, of.spec.seed, position, place, within=of.dataset.beside(place[0]))
        self.places = chain([place], others)
        self.bad = bad
        self.failed: list[BadRecord] = []
        self.name = ("", "")
        self.frames: list[str] = []  # of a clip, the members of the sample that was read last
        for shard, index in islice(self.places, of.spec.skipped_positions.get(position, 0)):
            self.name = (of.dataset.names[shard], of.reader.key(shard, index))
            self._fail("skipped: the run rewound from a batch with it", passed_over=True)

    def read(self) -> Sample:
        for shard, index in self.places:
            try:
                sample = self.of.reader.read(shard, index, only=self._members(shard, index))
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

    def _members(self, shard: int, index: int) -> Sequence[str] | None:
        """The members to read: of an image, or the frames that are shown; with user code all of them."""
        if self.of.spec.stages:
            return None
        if not self.of.clips:
            return IMAGE_EXTENSIONS
        self.frames = frame_members(self.of.reader.extensions(shard, index))
        return clips.needed_members(self.frames, self.of.clips, seed=self.of.spec.seed, position=self.position)

    def decode(self, sample: Sample) -> _Frames:
        while True:
            try:
                frames = self._decoded(sample)
            except DecodeError as error:
                self._fail(str(error))
                (sample,) = _through_stages(self.of.spec.stages, (self.read() for _ in range(1)), 1)
                continue
            for record in self.failed:
                record["substitute"] = "/".join(self.name)
            return frames

    def _decoded(self, sample: Sample) -> _Frames:
        spec = self.of.spec
        how = spec.in_chans, spec.orientation, spec.value_range, spec.max_pixels
        if not self.of.clips:
            return _Frames(1, {0: _as_tensor(decode_sample(sample, *how))})
        names = frame_members(sample) if spec.stages else self.frames
        needed = clips.needed_members(names, self.of.clips, seed=spec.seed, position=self.position)
        if not needed:
            raise DecodeError(f"no frames (0000.jpg, ...) and no image among its members: {', '.join(sample)}")
        numbers = {name: number for number, name in enumerate(names)}
        decoded = {numbers[name]: _as_tensor(decode_file(sample[name], *how)) for name in needed}
        sizes = {tuple(image.shape) for image in decoded.values()}
        if len(sizes) > 1:
            raise DecodeError(f"its frames differ in size: {sorted(sizes)}")
        return _Frames(len(names), decoded)

    def _fail(self, reason: str, *, passed_over: bool = False) -> None:
        shard, key = self.name
        record = BadRecord(
            position=self.position, shard=shard, key=key, reason=reason, substitute="", passed_over=passed_over
        )
        self.failed.append(record)
        self.bad.append(record)


class _Entry:
    """The instances of one name in the batch: their pixels, and the random numbers of their colours."""

    def __init__(
        self, name: str, views: list[tuple[int, ViewSpec]], batch: int, channels: int, dtype: torch.dtype
    ) -> None:
        self.name = name
        self.views = views
        count = sum(view.num_images for _, view in views)
        height, width = views[0][1].size
        pixels = torch.empty((batch, count, height, width, channels), dtype=dtype)
        self.images = pixels.permute(0, 1, 4, 2, 3)
        self.uniforms = np.empty((batch, count, crops.UNIFORMS))

    def crop(self, row: int, frames: _Frames, seed: int, position: int) -> None:
        """Cut all instances of one sample."""
        slot = 0
        for index, view in self.views:
            uniforms = keyed.generator(seed, position, keyed.view_purpose(index)).random((view.count, crops.UNIFORMS))
            clip = max(1, view.frames)
            self.uniforms[row, slot : slot + view.num_images] = uniforms.repeat(clip, axis=0)
            shown = [[0]] * view.count
            if view.frames:
                shown = clips.shown_frames(frames.total, index, view, seed=seed, position=position)
            for numbers, of_clip in zip(uniforms[:, : crops.BOX_UNIFORMS].tolist(), shown, strict=True):
                height, width = frames.images[of_clip[0]].shape[2:]
                box = crops.crop_box(numbers, height, width, view.scale, view.ratio)
                for number in of_clip:
                    crops.resize_into(self.images[row, slot : slot + 1], frames.images[number], box, view.interpolation)
                    slot += 1

    def params(self) -> Tensor:
        starts = np.cumsum([view.num_images for _, view in self.views])[:-1]
        parts = np.split(self.uniforms, starts, axis=1)
        made = [crops.colour_params(part, view) for part, (_, view) in zip(parts, self.views, strict=True)]
        return torch.from_numpy(np.concatenate(made, axis=1))


def _as_tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None]


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
        raise ValueError(f"stage {name} yielded {count} samples for {expected}; it must yield one for each it takes")
