"""Which values the images of a data set hold that have more than 8 bits, measured on some of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from pretrain.data.formats.stored import DecodeError
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.image_files import IMAGE_EXTENSIONS
from pretrain.data.shards.reader import BadSample, Reader
from pretrain.data.views.decode import stored_values

LOOKED_AT = 64  # samples
_UPPER_BIT = 1 << 15


@dataclass(frozen=True)
class DeepValues:
    """Stored values of the `images` of one kind among the `looked` at.

    low, high: the smallest and the largest. percentiles: 0.1 and 99.9 %, of a part of the pixels.
    """

    kind: str
    images: int
    looked: int
    low: float
    high: float
    percentiles: tuple[float, float]

    def __str__(self) -> str:
        ends = f"values {self.low:g} to {self.high:g}, 0.1 % to 99.9 % of them {self.percentiles[0]:g} to "
        return f"{self.images} of {self.looked} images looked at are {self.kind}: {ends}{self.percentiles[1]:g}"

    @property
    def suggested(self) -> str:
        """A `data.range` that clips none of them: of the bits that are used where the values count from 0."""
        if self.low >= 0 and self.high >= 1 and not self.kind.startswith("float32"):
            return f"[0, {(1 << int(self.high).bit_length()) - 1}]"
        return f"[{self.low:g}, {self.high:g}]"

    @property
    def needs_range(self) -> bool:
        """Whether training cannot do without: arrays, and PNGs whose upper 8 bits do not hold the image."""
        return self.kind != "16-bit PNG" or self.high < _UPPER_BIT


def look_at_values(dataset: Dataset) -> DeepValues | None:
    """Of the readable images among up to LOOKED_AT samples, evenly chosen; None if none has more than 8 bits."""
    reader = Reader(dataset)
    chosen = np.linspace(0, dataset.num_samples - 1, min(LOOKED_AT, dataset.num_samples)).astype(int)

    def files() -> Iterator[bytes]:
        for number in chosen.tolist():
            try:
                sample = reader.read(*dataset.locate(number), only=IMAGE_EXTENSIONS)
            except BadSample:
                continue
            yield next((sample[name] for name in IMAGE_EXTENSIONS if name in sample), b"")

    found = measure_values(files(), looked=len(chosen))
    reader.close()
    return found


def measure_values(files: Iterable[bytes], *, looked: int) -> DeepValues | None:
    """Of the image files, those that can be read among `looked`; None if none has more than 8 bits."""
    found: dict[str, list[np.ndarray]] = {}
    for data in files:
        try:
            deep = stored_values(data)
        except DecodeError:
            continue
        if deep is not None:
            kind, values = deep
            finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
            if finite.size:
                found.setdefault(kind, []).append(_some(finite))
    if not found:
        return None
    kind = max(found, key=lambda name: len(found[name]))
    values = np.concatenate(found[kind])
    low, high = (float(end) for end in np.percentile(values, (0.1, 99.9)))
    return DeepValues(kind, len(found[kind]), looked, float(values.min()), float(values.max()), (low, high))


def _some(values: np.ndarray) -> np.ndarray:
    """Up to 10,000 of the values, the smallest and the largest among them."""
    flat = values.reshape(-1)
    some = flat[:: max(1, flat.size // 10_000)]
    return np.concatenate([some, [flat.min(), flat.max()]])
