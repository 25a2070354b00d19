"""Refuse a checkpoint whose tensors are not those of the model."""

from __future__ import annotations

from pathlib import Path

from pretrain.engine.checkpoint.commit import CheckpointError


def check_same_model(folder: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError with the differences between this model and the one in `folder`."""
    differences = [
        f"{name}: {_shape(found.get(name))} in the checkpoint, {_shape(expected.get(name))} in this model"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    if differences:
        more = f"\n  ... and {len(differences) - 10} more" if len(differences) > 10 else ""
        listed = "\n  ".join(differences[:10])
        raise CheckpointError(f"{folder} was written for another model or config:\n  {listed}{more}")


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
