"""What the commands of `fovea data` share: a progress bar, numbers and sizes as a person writes them."""

from __future__ import annotations

import argparse
import re

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pretrain.core.machine.terminal import console

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def progress() -> Progress:
    """A bar on stderr that is removed at its end."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console(stderr=True), transient=True)


def positive(text: str) -> int:
    """The type of an argument: a whole number above 0."""
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def size(text: str) -> int:
    """The type of an argument: bytes, from 100MB or 1.5GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?)B?", text.strip().upper())
    if match is None or match[2] == "I" or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected a size such as 100MB or 1.5GiB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def human(size: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"
