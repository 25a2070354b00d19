"""`fovea data stats`: the stored values of every channel, measured, and the settings that follow from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.core.files import read_bytes
from pretrain.core.images import ValueRange
from pretrain.data.formats.stored import DecodeError
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.image_files import IMAGE_EXTENSIONS
from pretrain.data.shards.reader import BadSample
from pretrain.data.show import choose
from pretrain.data.views.decode import image_values
from pretrain.data.views.values import to_pixels_of_range
from pretrain.data.write.sources import find_sources

FILE = "statistics.json"  # next to dataset.json; no part of the fingerprint, which it names
PERCENTILES = (0.1, 1.0, 50.0, 99.0, 99.9)
_VERSION = 1
_EIGHT_BITS = {"8-bit image", "uint8 TIFF", "uint8 DICOM", "uint8 .npy", "palette TIFF"}
_SAMPLED = 4_000_000  # values of a channel that are kept for percentiles, over all images


@dataclass
class Channels:
    """Values of the images that have one number of channels, float64 [C] each.

    Mean and standard deviation are of all their pixels, and so are `pixel_sums` of the pixels in [0, 1] of a given
    `data.range`; percentiles and shares are of a regular part of them.
    """

    count: int
    images: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    pixels: int = 0
    sums: np.ndarray = field(default_factory=lambda: np.zeros(0))
    pixel_sums: np.ndarray = field(default_factory=lambda: np.zeros(0))
    low: np.ndarray = field(default_factory=lambda: np.zeros(0))
    high: np.ndarray = field(default_factory=lambda: np.zeros(0))
    all_bits: int = 0
    samples: list[np.ndarray] = field(default_factory=list)

    def add(self, kind: str, values: np.ndarray, value_range: ValueRange | None, sampled: int) -> None:
        """Add an image [H, W, C]."""
        flat = values.reshape(-1, self.count)
        sums = _sums(flat)
        low, high = flat.min(0).astype(float), flat.max(0).astype(float)
        first = not self.images
        self.sums = sums if first else self.sums + sums
        self.low = low if first else np.minimum(self.low, low)
        self.high = high if first else np.maximum(self.high, high)
        if value_range is not None:
            sums = _sums(to_pixels_of_range(values, value_range).reshape(flat.shape)) / [[255], [255**2]]
            self.pixel_sums = sums if first else self.pixel_sums + sums
        if flat.dtype.kind == "u":
            self.all_bits |= int(np.bitwise_or.reduce(flat, axis=None))
        self.samples.append(flat[:: max(1, len(flat) // sampled)].copy())
        self.images, self.pixels = self.images + 1, self.pixels + len(flat)
        self.kinds[kind] += 1

    @property
    def counts_from_0(self) -> bool:
        """Whether all values are integers from 0, whose bits say what white is."""
        return all(not kind.startswith("float32") for kind in self.kinds) and bool((self.low >= 0).all())

    @property
    def mixes_depths(self) -> bool:
        """Whether some images have 8 bits, and others more."""
        return bool(_EIGHT_BITS & set(self.kinds)) and not set(self.kinds) <= _EIGHT_BITS

    @property
    def depth(self) -> str:
        """In words: "12 bits in uint16 TIFF"."""
        kinds = " and ".join(f"{kind} ({n})" if len(self.kinds) > 1 else kind for kind, n in self.kinds.most_common())
        if not self.counts_from_0:
            return f"values {self.low.min():g} to {self.high.max():g} in {kinds}"
        bits, unused = self.all_bits.bit_length(), (self.all_bits & -self.all_bits).bit_length() - 1
        raised = f", of which the lowest {unused} are always 0" if unused > 0 else ""
        return f"{bits} bits{raised} in {kinds}"

    def suggested_range(self) -> list[Any] | None:
        """A `data.range` that clips nothing, of the bits that are used or the ends of every channel; None: 8 bits."""
        if set(self.kinds) <= _EIGHT_BITS:
            return None
        if self.counts_from_0:
            return [0, (1 << max(1, self.all_bits.bit_length())) - 1]
        pairs = [[low, high if high > low else low + 1] for low, high in zip(self.low, self.high, strict=True)]
        return pairs[0] if len(pairs) == 1 else pairs

    def as_json(self, value_range: ValueRange | None) -> dict[str, Any]:
        """All numbers, per channel, and `settings` of the section `data` that fit them."""
        values = np.concatenate(self.samples).astype(np.float64)
        mean, std = _mean_std(self.sums, self.pixels)
        given = self.suggested_range() if value_range is None else np.asarray(value_range).tolist()
        if value_range is None:
            low, high = np.atleast_2d(np.asarray(given or [0, 255], float)).T
            pixel_mean, pixel_std = (mean - low) / (high - low), std / (high - low)
        else:
            pixel_mean, pixel_std = _mean_std(self.pixel_sums, self.pixels)
        percentiles = np.percentile(values, PERCENTILES, axis=0)
        settings = {"range": given, "mean": _short(pixel_mean), "std": _short(pixel_std)}
        return {
            "images": self.images,
            "depth": self.depth,
            "mean": mean.tolist(),
            "std": std.tolist(),
            "min": self.low.tolist(),
            "max": self.high.tolist(),
            "percentiles": {f"{q:g}": row.tolist() for q, row in zip(PERCENTILES, percentiles, strict=True)},
            "share_at_min": (values <= self.low).mean(0).tolist(),
            "share_at_max": (values >= self.high).mean(0).tolist(),
            "settings": {key: value for key, value in settings.items() if value is not None},
        }


@dataclass
class Measured:
    """channels: by their number. unreadable: (name, reason). looked: images that were looked at."""

    channels: dict[int, Channels] = field(default_factory=dict)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    looked: int = 0

    def as_json(self, fingerprint: str | None, value_range: ValueRange | None = None) -> dict[str, Any]:
        """The content of FILE; the most frequent number of channels first."""
        ordered = sorted(self.channels.values(), key=lambda found: -found.images)
        return {
            "version": _VERSION,
            "fingerprint": fingerprint,
            "looked_at": self.looked,
            "unreadable": len(self.unreadable),
            "by_channels": {str(found.count): found.as_json(value_range) for found in ordered},
        }


def of_shards(dataset: Dataset, limit: int, seed: int) -> tuple[Iterator[tuple[str, bytes | BadSample]], int]:
    """(key, image file) of up to `limit` samples, chosen by `seed`, and their number."""

    def files() -> Iterator[tuple[str, bytes | BadSample]]:
        for key, sample in choose(dataset, limit, seed):
            if isinstance(sample, BadSample):
                yield key, sample
            else:
                yield key, next((sample[name] for name in IMAGE_EXTENSIONS if name in sample), b"")

    return files(), min(limit, dataset.num_samples)


def of_folder(folder: Path, limit: int, seed: int) -> tuple[Iterator[tuple[str, bytes | BadSample]], int]:
    """The same of the images below a folder."""
    names = [file.name for file in find_sources(folder, labels="none").files]
    chosen = sorted(np.random.default_rng(seed).permutation(len(names))[:limit].tolist())

    def files() -> Iterator[tuple[str, bytes | BadSample]]:
        for number in chosen:
            try:
                yield names[number], read_bytes(folder / names[number])
            except OSError as error:
                yield names[number], BadSample(str(folder), names[number], "", f"cannot be read: {error.strerror}")

    return files(), len(chosen)


def measure(
    files: Iterable[tuple[str, bytes | BadSample]], number: int, value_range: ValueRange | None = None
) -> Measured:
    """Decode `number` image files, (name, bytes) each, and measure their values.

    Args:
        value_range: `data.range`, under which the settings mean and std are measured.
    """
    measured = Measured()
    for name, data in files:
        measured.looked += 1
        if isinstance(data, BadSample):
            measured.unreadable.append((name, data.reason))
            continue
        try:
            kind, values = image_values(data)
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise DecodeError("holds NaN or infinity")
            found = measured.channels.setdefault(values.shape[2], Channels(values.shape[2]))
            found.add(kind, values, value_range, sampled=max(1000, _SAMPLED // number))
        except ValueError as error:
            measured.unreadable.append((name, str(error)))
    measured.channels = {count: found for count, found in measured.channels.items() if found.images}
    return measured


def _sums(flat: np.ndarray) -> np.ndarray:
    """[2, C]: sums of the values [n, C] and of their squares, in float64, channel by channel to save memory."""
    columns = (flat[:, channel].astype(np.float64) for channel in range(flat.shape[1]))
    return np.array([[column.sum(), column @ column] for column in columns]).T


def _mean_std(sums: np.ndarray, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    mean = sums[0] / pixels
    return mean, np.sqrt(np.maximum(sums[1] / pixels - mean**2, 0))


def _short(values: np.ndarray) -> list[float]:
    return [float(f"{value:.6g}") for value in values]
