"""Labelled images, whatever they were read from, and what is wrong with their annotations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from finetune.predictions import Classes
from pretrain.core.configlib import ConfigError


@dataclass(frozen=True)
class Example:
    """One labelled image.

    id      unique in its set; of COCO data the image id
    name    for messages: a file, or "shard/key"
    image   uint8 [H, W, 3]
    target  classification: int, -1 for none; detection: `Instances`; segmentation: uint8 or int32 [H, W] with 255 for
            void; depth: float32 [H, W] metres with 0 where it is not known
    """

    id: str | int
    name: str
    image: np.ndarray
    target: Any

    def without_pixels(self) -> Example:
        """The same with an image of its size and no channels: what a metric needs, and cheap to send."""
        return Example(self.id, self.name, self.image[:, :, :0], self.target)


class BadExample(ValueError):  # noqa: N818
    """An example that cannot be decoded: its `name` and the `reason`."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.name, self.reason)


def check_size(name: str, image: np.ndarray, size: tuple[int, ...], what: str) -> None:
    """BadExample unless `what` of an image, its map or its annotations, is of the (height, width) of `image`."""
    height, width = image.shape[:2]
    if size == (height, width):
        return
    turned = "; an EXIF orientation is not applied, save the image upright" if size == (width, height) else ""
    raise BadExample(name, f"the image has {width} x {height} pixels, its {what} {size[1]} x {size[0]}{turned}")


class Examples(Protocol):
    """A set of examples. Opens files when they are first read; pickles small, for it is sent to every worker.

    classes      names by label, and their ids in the user's files
    fingerprint  sha256 hex of what decides the order and the content: file names and sizes, annotations, subset
    findings     what opening it found wrong
    """

    classes: Classes
    fingerprint: str
    findings: DataProblems

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """BadExample when it cannot be decoded."""
        ...


@dataclass(frozen=True)
class DataProblem:
    """One thing that is wrong: its kind ("box of zero area"), the file, the id there, and a sentence."""

    kind: str
    file: str
    id: str
    text: str

    def __str__(self) -> str:
        where = f"{self.file}: {self.id}" if self.id else self.file
        return f"{where}: {self.text}"


@dataclass
class DataProblems:
    """What is wrong with annotations, found when a set is opened. What is listed here is not trained on."""

    found: list[DataProblem] = field(default_factory=list)

    def add(self, kind: str, file: str, id: str | int, text: str) -> None:
        self.found.append(DataProblem(kind, str(file), str(id), text))

    def counts(self) -> Mapping[str, int]:
        """How many of each kind, most frequent first."""
        return dict(Counter(finding.kind for finding in self.found).most_common())

    def lines(self, limit: int | None = None) -> list[str]:
        """A line for each; after `limit` of them, one that says how many more there are."""
        lines = [str(finding) for finding in self.found[:limit]]
        more = len(self.found) - len(lines)
        return [*lines, f"... and {more} more"] if more else lines

    def rows(self) -> list[dict[str, str]]:
        """For findings.jsonl."""
        return [asdict(finding) for finding in self.found]

    def check(self, strict: bool, *, source: str = "the annotations") -> None:
        """Stop over what is wrong, if asked to.

        Raises:
            ConfigError: `strict`, and something was found; all of it is listed.
        """
        if strict and self.found:
            raise ConfigError(f"{source} (data.strict)", [str(finding) for finding in self.found])

    def __len__(self) -> int:
        return len(self.found)
