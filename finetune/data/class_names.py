"""Names of the classes, and their numbers in the user's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from finetune.predictions import Classes
from pretrain.data import labels

FILE = labels.CLASSES_FILE


def read_classes(path: Path | str) -> Classes:
    """A json of classes, see `pretrain.data.labels.read_classes`.

    Raises:
        ValueError: it has none of the forms, or two classes have one name or one number.
    """
    return of_numbers(labels.read_classes(Path(path)))


def of_numbers(names: Mapping[int, str]) -> Classes:
    """Classes in the order of their numbers."""
    return Classes([names[number] for number in sorted(names)], sorted(names))


def numbered(count: int) -> Classes:
    """Classes with numbers and no names."""
    return Classes([str(number) for number in range(count)])
