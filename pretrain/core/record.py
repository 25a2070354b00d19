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
from pretrain.core.files import read_bytes

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
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.exists() else []
    rows = [parse_row(line) for line in lines]
    if None in rows:
        number = rows.index(None)
        problem = f"line {number + 1} is damaged: {lines[number][:60]!r}"
        raise ConfigError(str(path), [f"{problem}; the run drops it when it resumes, or remove the line"])
    return _merged([row for row in rows if row is not None])


def readable_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a metrics.jsonl, merged as by `read_rows`, and the number of damaged lines, which are skipped."""
    found, skipped = readable_lines(path)
    rows = [row for row in found if type(row.get("step")) is int]
    return _merged(rows), skipped + len(found) - len(rows)


def readable_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a file with one JSON object per line, and the number of lines that hold none."""
    text = read_bytes(path).decode("utf-8", "replace") if path.exists() else ""
    found = [_object(line) for line in text.split("\n") if line.strip()]
    known = [row for row in found if row is not None]
    return known, len(found) - len(known)


def parse_row(line: str) -> dict[str, Any] | None:
    """A line of JSON with a step; None if it is damaged."""
    row = _object(line)
    return row if row is not None and type(row.get("step")) is int else None


def _object(line: str) -> dict[str, Any] | None:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return cast(dict[str, Any], row) if isinstance(row, dict) else None


def _merged(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each step, in order; of a value that is there twice the last."""
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        merged.setdefault(row["step"], {}).update(row)
    return [merged[step] for step in sorted(merged)]


def columns(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Rows as columns of equal length; nan where a row lacks the value."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name, nan) for row in rows] for name in names}
