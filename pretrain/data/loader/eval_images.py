"""Labelled images or clips for probes: each once, in the order of the data set, without random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pretrain.core.images import Orientation, ValueRange
from pretrain.data.formats.stored import DecodeError
from pretrain.data.labels import refuse_splits
from pretrain.data.loader.samples import read_label
from pretrain.data.loader.workers import run_in_workers
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.image_files import IMAGE_EXTENSIONS, frame_members
from pretrain.data.shards.reader import BadSample, Reader
from pretrain.data.views import clips
from pretrain.data.views.center_crop import CenterCrop
from pretrain.data.views.decode import LABEL_EXTENSION, decode_file


class EvalImages:
    """Batches (images float32 [b, C, h, w] or clips [b, T, C, h, w], normalized; labels int64 [b]), the last smaller.

    size         (h, w) in pixels, the central part of the image after its shorter side was resized with antialiasing to
    resize       that many pixels; default 256 / 224 of the size, as Resize(256), CenterCrop(224) of the official code
    orientation  exif: photos are turned upright; stored: their EXIF orientation is ignored
    value_range  of images of any depth, as `data.range`
    frames, stride  of clips: T frames, so far apart, in the middle of each sample; 0: of images
    max_samples  evenly spaced through the data set, so that every class is met in sorted data
    labelled     False: samples need no label, all labels are 0
    rank, world_size  this rank takes its contiguous share
    give_up      asked before each batch; if it is true, StoppedWaitingError

    A label is the integer in the sample's `.cls` member. Images that cannot be used are omitted and listed in `bad`
    as (shard, key, reason), renewed in each pass. ValueError for samples without an integer label, and for classes that
    are parts of a data set (train, val, ...).
    """

    def __init__(
        self,
        dataset: Dataset,
        size: tuple[int, int],
        *,
        in_chans: int,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        resize: int | None = None,
        interpolation: Literal["bicubic", "bilinear"] = "bicubic",
        orientation: Orientation = "exif",
        value_range: ValueRange | None = None,
        frames: int = 0,
        stride: int = 1,
        max_samples: int | None = None,
        labelled: bool = True,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        give_up: Callable[[], bool] | None = None,
    ) -> None:
        if labelled and LABEL_EXTENSION not in dataset.extensions:
            raise ValueError(
                f"the data set has no labels: {dataset.names[0]} ... hold {', '.join(dataset.extensions)}, "
                f"and no .{LABEL_EXTENSION}; write it with labels, or remove the probe section"
            )
        refuse_splits(dataset.paths)
        if len(mean) != in_chans or len(std) != in_chans:
            raise ValueError(f"mean has {len(mean)} and std {len(std)} numbers for in_chans={in_chans}")
        if batch_size < 1 or (max_samples is not None and max_samples < 1):
            raise ValueError(f"batch_size and max_samples must be at least 1, got {batch_size} and {max_samples}")
        resize = round(max(size) * 256 / 224) if resize is None else resize
        if resize < max(size):
            raise ValueError(f"resize={resize} is smaller than the size {size} that is cut from it")
        count = dataset.num_samples
        chosen = np.arange(count) if max_samples is None else np.linspace(0, count - 1, min(max_samples, count)).round()
        share = chosen[rank * len(chosen) // world_size : (rank + 1) * len(chosen) // world_size].astype(np.int64)
        geometry = CenterCrop(size, resize, interpolation)
        normalize = torch.tensor([list(mean), list(std)], dtype=torch.float32).view(2, in_chans, 1, 1)
        decode = partial(decode_file, in_chans=in_chans, orientation=orientation, value_range=value_range)
        self._batches = _EvalBatches(dataset, share, batch_size, geometry, decode, normalize, labelled, frames, stride)
        self._num_workers, self._give_up = num_workers, give_up
        self.bad: list[tuple[str, str, str]] = []

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.bad = []
        found = run_in_workers(self._batches, len(self._batches), num_workers=self._num_workers, give_up=self._give_up)
        for images, labels, bad in found:
            self.bad += bad
            if len(labels):
                yield images, labels


class _EvalBatches:
    """Item i is batch i, with the images omitted from it."""

    def __init__(
        self,
        dataset: Dataset,
        samples: np.ndarray,
        batch_size: int,
        geometry: CenterCrop,
        decode: Callable[[bytes], np.ndarray],
        normalize: Tensor,
        labelled: bool,
        frames: int,
        stride: int,
    ) -> None:
        self.reader = Reader(dataset)
        self.samples = samples
        self.batch_size = batch_size
        self.geometry = geometry
        self.decode = decode
        self.normalize = normalize
        self.labelled = labelled
        self.frames, self.stride = frames, stride

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, list[tuple[str, str, str]]]:
        images: list[Tensor] = []
        labels: list[int] = []
        bad: list[tuple[str, str, str]] = []
        for number in self.samples[index * self.batch_size : (index + 1) * self.batch_size].tolist():
            shard, within = self.reader.dataset.locate(number)
            name = self.reader.dataset.names[shard]
            try:
                members = self._members(shard, within)
                sample = self.reader.read(shard, within, only={*members, LABEL_EXTENSION})
                label = read_label(sample, f"{name}/{sample['__key__']}") if self.labelled else 0
                images.append(self._pixels(sample, members))
            except BadSample as error:
                bad.append((name, error.key, error.reason))
                continue
            except DecodeError as error:
                bad.append((name, self.reader.key(shard, within), str(error)))
                continue
            labels.append(label)
        if not images:
            empty = torch.zeros((0, *[self.frames] * (self.frames > 0), self.normalize.shape[1], *self.geometry.size))
            return empty, torch.zeros(0, dtype=torch.int64), bad
        stacked = torch.stack(images).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        return stacked.sub_(self.normalize[0]).div_(self.normalize[1]), torch.tensor(labels), bad

    def _members(self, shard: int, within: int) -> list[str]:
        """The members that are shown, in order, a name for each frame; of an image its one."""
        found = self.reader.extensions(shard, within)
        if not self.frames:
            return [name for name in IMAGE_EXTENSIONS if name in found][:1]
        names = frame_members(found)
        return [names[number] for number in clips.middle_frames(len(names), self.frames, self.stride)] if names else []

    def _pixels(self, sample: Mapping[str, bytes], members: list[str]) -> Tensor:
        if not members:
            frames = "frame (0000.jpg, ...) and no image" if self.frames else "image"
            raise DecodeError(f"no {frames} member ({', '.join(IMAGE_EXTENSIONS)}) in the sample")
        shown = {name: self.geometry(self.decode(sample[name])) for name in dict.fromkeys(members)}
        return torch.stack([shown[name] for name in members]) if self.frames else shown[members[0]]
