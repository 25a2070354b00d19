"""Planted examples: images whose target can be seen in them, without a file."""

from __future__ import annotations

import hashlib

import numpy as np

from finetune.data.examples import BadExample, DataProblems, Example
from finetune.predictions import Classes


class Planted:
    """`count` images of two classes, dark and bright; those in `broken` cannot be decoded."""

    def __init__(self, count: int, *, size: int = 32, broken: tuple[int, ...] = ()) -> None:
        self.count, self.size, self.broken = count, size, broken
        self.classes, self.findings = Classes(("dark", "bright")), DataProblems()
        self.labels = np.arange(count) % 2
        self.fingerprint = hashlib.sha256(f"{count} {size} {broken}".encode()).hexdigest()
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        self.read.append(index)
        if index in self.broken:
            raise BadExample(f"folder/{index}.jpg", "planted damage")
        label = int(self.labels[index])
        noise = np.random.default_rng(index).integers(0, 60, (self.size, self.size, 3))
        return Example(index, f"folder/{index}.jpg", (noise + 120 * label).astype(np.uint8), label)
