"""A part of a set of examples: a fraction or all others, a number of examples per class, or the first ones."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from finetune.data.examples import Example, Examples
from pretrain.data.sampling.subset import of_each_class


class Subset:
    """The examples `indices` (ascending) of another set.

    Raises:
        ValueError: the set has images with objects, and the chosen ones have none.
    """

    def __init__(self, whole: Examples, indices: np.ndarray) -> None:
        self.whole, self.indices = whole, np.asarray(indices, dtype=np.int64)
        self.classes, self.findings = whole.classes, whole.findings
        digest = hashlib.sha256(whole.fingerprint.encode())
        digest.update(self.indices.astype("<i8").tobytes())
        self.fingerprint = digest.hexdigest()
        has_objects = getattr(whole, "has_objects", None)
        if has_objects is not None and not has_objects[self.indices].any():
            raise ValueError(f"the {len(indices)} images chosen have no object; take more by limit or fraction")
        labels = getattr(whole, "labels", None)
        if labels is not None:
            self.labels = np.asarray(labels)[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.whole[int(self.indices[index])]

    def file(self, index: int) -> bytes:
        """The file of an image."""
        return self.whole.file(int(self.indices[index]))


def subset(whole: Examples, source: Any) -> Examples:
    """The part that a `DataSource` requests, by default the complete set.

    Where the set has `labels` (int [n], of images), the fraction is the same in each class, with at least one example.

    Raises:
        ValueError: `per_class` without labels, or more than a class has.
    """
    labels = getattr(whole, "labels", None)
    if source.limit is not None:
        return Subset(whole, np.arange(min(source.limit, len(whole)))) if source.limit < len(whole) else whole
    if source.per_class is None and source.without_fraction is None and source.fraction in (None, 1.0):
        return whole
    if source.per_class is not None and labels is None:
        raise ValueError(f"per_class {source.per_class}: these images have no class labels; use fraction or limit")
    groups = np.zeros(len(whole), dtype=np.int64) if labels is None else np.asarray(labels)
    fraction = source.fraction or source.without_fraction
    chosen = of_each_class(
        groups, fraction=fraction, per_class=source.per_class, seed=source.subset_seed, names=whole.classes
    )
    if source.without_fraction is not None:
        chosen = np.setdiff1d(np.arange(len(whole)), chosen)
    return Subset(whole, chosen)
