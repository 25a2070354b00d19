"""Inspect a data set before training on it: a contact sheet, and statistics of its samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.core.images import ValueRange
from pretrain.core.text import shown
from pretrain.data.depths import DeepValues, look_at_values
from pretrain.data.formats.read import read_stored
from pretrain.data.formats.stored import DecodeError
from pretrain.data.labels import read_classes
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.image_files import IMAGE_EXTENSIONS, frame_members
from pretrain.data.shards.reader import BadSample, Reader
from pretrain.data.sheet import Cell, draw_sheet
from pretrain.data.views.decode import decode_image, decode_npy, decode_stored
from pretrain.data.views.orientation import UPRIGHT, read_orientation, upright
from pretrain.data.write.images import UnreadableImageError, open_array, open_image

_PIXELS = 50_000  # per image, enough for mean and std
_COLUMNS = 8


@dataclass
class Statistics:
    """Of `examined` samples out of `samples`; channel sums are over pixels in [0, 1], by number of channels."""

    samples: int
    shards: int
    bytes: int
    extensions: tuple[str, ...]
    examined: int = 0
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    turned: int = 0
    deep: DeepValues | None = None
    modes: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    channel_sums: dict[int, np.ndarray] = field(default_factory=dict)

    def mean_std(self, channels: int) -> tuple[list[float], list[float]]:
        """Mean and standard deviation per channel, over the pixels of all examined images with that many channels."""
        count, total, squares = self.channel_sums[channels]
        mean = total / count
        return mean.tolist(), np.sqrt(np.maximum(squares / count - mean**2, 0)).tolist()

    def rows(self) -> list[tuple[str, str]]:
        """Name and value, for a table."""
        rows = [
            ("samples", f"{self.samples} in {self.shards} shards"),
            ("bytes", f"{self.bytes}"),
            ("members", shown(", ".join(self.extensions))),
            ("examined", f"{self.examined} samples; the rows below are of these"),
        ]
        for name, values in (("width", self.widths), ("height", self.heights)):
            if values:
                rows.append((name, f"{min(values)} / {int(np.median(values))} / {max(values)}  (min / median / max)"))
        if self.turned:
            rows.append(("EXIF orientation", f"{self.turned} photos are turned upright (data.orientation)"))
        rows.append(("modes", ", ".join(f"{mode} {count}" for mode, count in self.modes.most_common())))
        if self.deep is not None:
            rows.append(("more than 8 bits", f"{self.deep}; data.range={self.deep.suggested} keeps all of them"))
        for channels in sorted(self.channel_sums):
            mean, std = self.mean_std(channels)
            of = "RGB" if channels == 3 else f"{channels} channels"
            rows.append((f"mean, {of}", ", ".join(f"{value:.4f}" for value in mean)))
            rows.append((f"std, {of}", ", ".join(f"{value:.4f}" for value in std)))
        if self.labels:
            top = ", ".join(f"{shown(label)}: {count}" for label, count in self.labels.most_common(10))
            rows.append((f"labels ({len(self.labels)})", top + (" ..." if len(self.labels) > 10 else "")))
        worst = "".join(f"\n{shown(key)}: {shown(reason)}" for key, reason in self.unreadable[:5])
        rows.append(("unreadable", f"{len(self.unreadable)}{worst}"))
        return rows


def examine(
    dataset: Dataset,
    *,
    limit: int = 2000,
    seed: int = 0,
    value_range: ValueRange | None = None,
    done: Callable[[], None] = lambda: None,
) -> Statistics:
    """Decode up to `limit` samples, chosen by `seed`, and describe them.

    Args:
        value_range: `data.range`, under which mean and std are measured.
    """
    size = sum(row.bytes for row in dataset.rows)
    statistics = Statistics(dataset.num_samples, len(dataset.rows), size, dataset.extensions)
    statistics.deep = look_at_values(dataset)
    names = _class_names(dataset)
    for key, sample in choose(dataset, limit, seed):
        statistics.examined += 1
        done()
        try:
            if isinstance(sample, BadSample):
                raise UnreadableImageError(sample.reason)
            if "cls" in sample:
                label = _label(sample)
                statistics.labels[names.get(label, label)] += 1
            mode, pixels = decode(sample, value_range)
        except UnreadableImageError as error:
            statistics.unreadable.append((key, str(error)))
            continue
        statistics.turned += any(read_orientation(sample.get(name, b"")) != UPRIGHT for name in IMAGE_EXTENSIONS)
        height, width, channels = pixels.shape
        statistics.modes[mode] += 1
        statistics.widths.append(width)
        statistics.heights.append(height)
        stride = max(1, int((height * width / _PIXELS) ** 0.5))
        some = pixels[::stride, ::stride].reshape(-1, channels) / 255.0
        sums = np.stack([np.full(channels, len(some)), some.sum(0), (some**2).sum(0)])
        statistics.channel_sums[channels] = statistics.channel_sums.get(channels, 0) + sums
    return statistics


def save_sheet(
    dataset: Dataset, path: Path, *, count: int = 64, seed: int = 0, value_range: ValueRange | None = None
) -> None:
    """A PNG of `count` images chosen by `seed`, each over its key and label; an unreadable one shows the reason."""
    names = _class_names(dataset)
    cells = [_cell(key, sample, names, value_range) for key, sample in choose(dataset, count, seed)]
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(cells, min(_COLUMNS, len(cells))).save(path, "PNG")


def _cell(key: str, sample: dict[str, Any] | BadSample, names: dict[str, str], value_range: ValueRange | None) -> Cell:
    if isinstance(sample, BadSample):
        return Cell(sample.reason, key)
    label = _label(sample)
    try:
        return Cell(decode(sample, value_range)[1], key, names.get(label, label))
    except UnreadableImageError as error:
        return Cell(str(error), key, names.get(label, label))


def choose(dataset: Dataset, limit: int, seed: int) -> Iterator[tuple[str, dict[str, Any] | BadSample]]:
    """(key, sample or its error) of up to `limit` samples, in the order of the shards; of a clip the middle frame."""
    total = dataset.num_samples
    chosen = np.arange(total)
    if total > limit:
        chosen = np.sort(np.random.default_rng(seed).choice(total, limit, replace=False))
    reader = Reader(dataset)
    for position in chosen:
        shard, sample = dataset.locate(int(position))
        try:
            frames = frame_members(reader.extensions(shard, sample))
            found = reader.read(shard, sample, only={*IMAGE_EXTENSIONS, *frames[len(frames) // 2 :][:1], "cls"})
        except BadSample as error:
            yield error.key, error
        else:
            yield found["__key__"], found
    reader.close()


def decode(sample: dict[str, Any], value_range: ValueRange | None = None) -> tuple[str, np.ndarray]:
    """(PIL mode, or kind and channels; uint8 [H, W, C], upright).

    Of photos gray, palette and CMYK are RGB, and 16 bits cut to their upper 8. With a range of the stored values:
    float32 in the same unit, 0 to 255.
    """
    extension = next((name for name in (*IMAGE_EXTENSIONS, *frame_members(sample)) if name in sample), None)
    if extension is None:
        raise UnreadableImageError(f"no image among its members: {', '.join(k for k in sample if k[:2] != '__')}")
    try:
        if extension == "npy":
            array = open_array(sample[extension])
            channels = 1 if array.ndim == 2 else array.shape[2]
            return f"npy {channels}", decode_npy(sample[extension], channels, value_range)
        stored = read_stored(sample[extension])
        if stored is not None:
            channels = stored.values.shape[2]
            pixels = upright(decode_stored(stored, channels, value_range), read_orientation(sample[extension]))
            return f"{stored.kind} {channels}", pixels
        mode = open_image(sample[extension]).mode
        return mode, decode_image(sample[extension], 3, value_range=value_range)
    except UnreadableImageError:
        raise
    except DecodeError as error:
        raise UnreadableImageError(f"cannot be decoded: {error}") from error
    except Exception as error:  # a decoder raises errors of any type on hostile bytes
        raise UnreadableImageError(f"cannot be decoded: {str(error) or type(error).__name__}") from error


def _label(sample: dict[str, Any]) -> str:
    text: bytes = sample.get("cls", b"")
    return text.decode("utf-8", "replace").strip()


def _class_names(dataset: Dataset) -> dict[str, str]:
    """Label text -> "label name", from a classes.json next to the shards."""
    path = Path(dataset.paths[0]).parent / "classes.json"
    return {str(i): f"{i} {name}" for i, name in read_classes(path).items()} if path.exists() else {}
