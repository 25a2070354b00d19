"""Shards of samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pretrain.data.loader.samples import Samples
from pretrain.data.shards.dataset import Dataset


def open_shards(shards: str | Path | Sequence[str | Path], *, index: str | Path | None = None) -> Samples:
    """Open indexed shards as a sequence of samples.

    Args:
        shards: a folder, a glob, a brace range, or a list of tars.
        index: the folder of their index, where it is not next to them.

    Raises:
        ValueError: a shard is missing, differs from its index, or was never indexed (with the command that does).
    """
    return Samples(Dataset.open(shards, index))
