"""Reads fovea.json of a release that a configuration names, without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from pretrain.objectives.configs.values import Size


def facts(path: str) -> dict[str, Any] | None:
    """fovea.json of the release folder `path`; None for a file, or if `path` does not exist yet.

    Unreadable files are reported when they are opened, before training starts.
    """
    record = Path(path) / "fovea.json"
    try:
        loaded: Any = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    found = cast(dict[str, Any], loaded) if isinstance(loaded, dict) else {}
    return found if isinstance(found.get("model"), dict) else None


def patch_size(found: dict[str, Any]) -> int | None:
    """Side of a token in pixels."""
    value = found["model"].get("patch_size")
    return value if isinstance(value, int) and value > 0 else None


def grid_problems(key: str, path: str, found: dict[str, Any], grid: Size, in_chans: int, *, fixed: bool) -> list[str]:
    """Messages on why a release does not fit a model with `grid` patches (rows, columns).

    Args:
        fixed: the release supports only the grid of its training.
    """
    model: dict[str, Any] = found["model"]
    problems: list[str] = []
    patch, size = patch_size(found), model.get("img_size")
    if fixed and patch and size and (own := (size[0] // patch, size[1] // patch)) != grid:
        problems.append(
            f"objective.{key}: {path} was trained on {own[0]} x {own[1]} tokens, but the model has {grid[0]} x "
            f"{grid[1]} patches; choose model.img_size and model.patch_size with that grid, or train one for this"
        )
    if model.get("in_chans", in_chans) != in_chans:
        problems.append(f"objective.{key}: {path} reads {model['in_chans']} channels, model.in_chans is {in_chans}")
    return problems
