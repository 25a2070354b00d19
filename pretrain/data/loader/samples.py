"""The samples of a data set by their number, for programs that look at data; training reads through `make_loader`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from pretrain.core.images import Orientation, ValueRange
from pretrain.core.text import shown
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.reader import Reader
from pretrain.data.views.decode import LABEL_EXTENSION, decode_sample


@dataclass(frozen=True, repr=False)
class Sample:
    """key: its name in the shard. shard: path of the tar. members: bytes by extension."""

    key: str
    shard: str
    members: Mapping[str, bytes]

    def __repr__(self) -> str:
        sizes = ", ".join(f"{extension}: {len(data)} bytes" for extension, data in self.members.items())
        return f"Sample({self.key}: {sizes})"

    def image(
        self, in_chans: int = 3, orientation: Orientation = "exif", value_range: ValueRange | None = None
    ) -> np.ndarray:
        """uint8 [H, W, in_chans], upright; "stored" ignores the EXIF orientation.

        Args:
            value_range: (low, high) of the stored values, or a pair per channel, as `data.range`: float32, 0 to 255.

        Raises:
            DecodeError: (a ValueError) there is none, or it is damaged.
        """
        return decode_sample(self.members, in_chans, orientation, value_range)

    @property
    def label(self) -> int | None:
        """The class number; None without a `.cls` member. ValueError when it is not an integer."""
        return read_label(self.members, f"{self.shard}/{self.key}") if LABEL_EXTENSION in self.members else None


class Samples(Sequence[Sample]):
    """A data set as a sequence in canonical order. Every byte read is checked by its crc32c.

    Attributes:
        dataset: names, counts and rows of the shards.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self._reader = Reader(dataset)

    def __repr__(self) -> str:
        return f"Samples({len(self)} in {len(self.dataset.paths)} shards, fingerprint {self.fingerprint[:12]})"

    @property
    def fingerprint(self) -> str:
        """sha256 of the sorted shard rows: equal for equal data, wherever it is stored."""
        return self.dataset.fingerprint

    @property
    def shards(self) -> dict[str, int]:
        """Number of samples by path of the shard."""
        return dict(zip(self.dataset.paths, self.dataset.counts.tolist(), strict=True))

    def __len__(self) -> int:
        return self.dataset.num_samples

    @overload
    def __getitem__(self, number: int) -> Sample: ...
    @overload
    def __getitem__(self, number: slice) -> list[Sample]: ...

    def __getitem__(self, number: int | slice) -> Sample | list[Sample]:
        """One sample, or a list. BadSample when its bytes are not those that were indexed."""
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        found = self._reader.read(*self.dataset.locate(number % len(self)))
        members = {name: value for name, value in found.items() if not name.startswith("__")}
        return Sample(found["__key__"], found["__url__"], members)

    def __iter__(self) -> Iterator[Sample]:
        return (self[number] for number in range(len(self)))


def read_label(sample: Mapping[str, Any], name: str) -> int:
    """The class number in the `.cls` member of a sample called `name`. ValueError when it is missing or no integer."""
    text = sample.get(LABEL_EXTENSION)
    if text is None:
        raise ValueError(f"{shown(name)} has no label: its .{LABEL_EXTENSION} member is missing")
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"{shown(name)}.{LABEL_EXTENSION} holds {text[:40]!r}, expected an integer") from error
