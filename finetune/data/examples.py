"""Labelled images of any source, and the problems in their annotations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePath
from typing import Any, Protocol

import numpy as np

from finetune.predictions import Classes
from pretrain.core.configlib import ConfigError
from pretrain.core.text import shown


@dataclass(frozen=True)
class Example:
    """One labelled image.

    id      unique in its set; of COCO data the image id
    name    in messages: a file, or "shard/key"
    image   uint8 [H, W, C], or float32 in the same unit, 0 to 255 (`Reading`)
    target  classification: int, -1 for none; detection: `Instances`; segmentation: uint8 or int32 [H, W] with 255 for
            void; depth: float32 [H, W] metres, 0 where unknown
    """

    id: str | int
    name: str
    image: np.ndarray
    target: Any

    def without_pixels(self) -> Example:
        """The example with an image of the same size and no channels: enough for a metric, and cheap to send."""
        return Example(self.id, self.name, self.image[:, :, :0], self.target)

    def as_picture(self, channels: Sequence[int] | None = None) -> Example:
        """The example with an image for people, uint8 RGB: of three `channels`, from 0; default: the first three, of
        fewer the first in gray; named by `short_name`."""
        count = self.image.shape[2]
        chosen = list(channels or ((0, 1, 2) if count >= 3 else (0, 0, 0)))
        pixels = np.ascontiguousarray(self.image[:, :, chosen].round().astype(np.uint8))
        return Example(self.id, short_name(self.name), pixels, self.target)


def short_name(name: str) -> str:
    """A name as captions have it: of an absolute path the file and its folder, since pages leave this machine."""
    path = PurePath(name)
    return str(PurePath(*path.parts[-2:])) if path.is_absolute() else name


class BadExample(ValueError):  # noqa: N818
    """An example that cannot be decoded: its `name` and the `reason`."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(shown(f"{name}: {reason}"))
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.name, self.reason)


class Examples(Protocol):
    """A set of examples. It opens files at the first read, and is small when pickled, because every worker gets a copy.

    classes      names by label, and their ids in the user's files
    fingerprint  sha256 hex of all that determines order and content: file names and sizes, annotations, subset
    findings     problems found when it was opened
    """

    classes: Classes
    fingerprint: str
    findings: DataProblems

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Raises BadExample if it cannot be decoded."""
        ...

    def file(self, index: int) -> bytes:
        """The bytes of an example's image, as they are stored; ValueError if they cannot be read."""
        ...


@dataclass(frozen=True)
class DataProblem:
    """One problem: its kind ("box of zero area"), the file, the id there, and a sentence."""

    kind: str
    file: str
    id: str
    text: str

    def __str__(self) -> str:
        where = f"{self.file}: {self.id}" if self.id else self.file
        return shown(f"{where}: {self.text}")


@dataclass
class DataProblems:
    """Problems in annotations, found when a set is opened. The listed entries are not used in training.

    labels: number of objects, or of labelled images, in the files. lost: those of them that are not used, by kind.
    """

    found: list[DataProblem] = field(default_factory=list)
    labels: int = 0
    lost: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, file: str, id: str | int, text: str, *, lost: int = 0) -> None:
        """One problem, by which `lost` labels are not used."""
        self.found.append(DataProblem(kind, str(file), str(id), text))
        if lost:
            self.lost[kind] += lost

    def counts(self) -> Mapping[str, int]:
        """Number of problems of each kind, most frequent first."""
        return dict(Counter(finding.kind for finding in self.found).most_common())

    def lines(self, limit: int | None = None) -> list[str]:
        """One line each; after `limit` lines, one with the number of the others."""
        lines = [str(finding) for finding in self.found[:limit]]
        more = len(self.found) - len(lines)
        return [*lines, f"... and {more} more"] if more else lines

    def rows(self) -> list[dict[str, str]]:
        """For findings.jsonl."""
        return [asdict(finding) for finding in self.found]

    def check(self, strict: bool, *, source: str = "the annotations") -> None:
        """Refuse the data if it has problems and `strict` is set.

        Raises:
            ConfigError: `strict`, and there are problems; all are listed.
        """
        if strict and self.found:
            raise ConfigError(f"{source} (data.strict)", [str(finding) for finding in self.found])

    def check_lost(self, limit: float, *, source: str) -> None:
        """Refuse the data if a larger share than `limit` of its labels is lost.

        Raises:
            ConfigError: it is; the message has the counts by kind and the first problems.
        """
        lost = self.lost.total()
        if lost <= limit * self.labels:
            return
        kinds = ", ".join(f"{count} x {kind}" for kind, count in self.lost.most_common())
        first = [str(finding) for finding in self.found if finding.kind in self.lost][:5]
        share = math.ceil(1000 * lost / self.labels) / 1000 if lost < self.labels else 1
        raise ConfigError(
            source,
            [
                f"{lost} of {self.labels} labels cannot be used: {kinds}; the limit is "
                f"data.max_lost_fraction={limit:g}. Correct the annotations, or train without these labels by "
                f"data.max_lost_fraction={share:g}",
                *first,
            ],
        )

    def __len__(self) -> int:
        return len(self.found)
