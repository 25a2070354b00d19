"""Records of a run: package versions, source commit, rows of metrics."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from math import nan
from pathlib import Path
from typing import Any, cast

from pretrain.core.configlib import ConfigError

PACKAGES = ("fovea", "torch", "torchvision", "timm", "deepspeed", "accelerate", "numpy", "simplejpeg", "safetensors")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect the results."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_commit() -> str | None:
    """The commit of the source tree, with `+` when it has uncommitted changes; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        head = _git(folder, "rev-parse", "HEAD")
        return head + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl, merged by step, in order of step; an incomplete last line is skipped.

    Raises:
        ConfigError: (a ValueError) a line is damaged; the message names it.
    """
    merged: dict[int, dict[str, float]] = {}
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        row = parse_row(line)
        if row is None:
            problem = f"line {number} is damaged: {line[:60]!r}; the run drops it when it resumes, or remove the line"
            raise ConfigError(str(path), [problem])
        merged.setdefault(row["step"], {}).update(row)
    return [merged[step] for step in sorted(merged)]


def parse_row(line: str) -> dict[str, Any] | None:
    """A line of JSON with a step; None if it is damaged."""
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return cast(dict[str, Any], row) if isinstance(row, dict) and type(cast(Any, row).get("step")) is int else None


def columns(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Rows as columns of equal length; nan where a row lacks the value."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name, nan) for row in rows] for name in names}
