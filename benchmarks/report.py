"""How every benchmark measures and reports: interleaved pairs, CPU seconds, a table, one line of JSON.

A pair runs ours and the baseline back to back, alternately, so that a drift of the machine affects both in the same
way; the ratio is the median over pairs of baseline / ours (more than 1: ours is faster).
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Pairs:
    """CPU seconds of each round, ours and the baseline's."""

    ours: tuple[float, ...]
    baseline: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """baseline / ours, pair by pair."""
        return [b / o for o, b in zip(self.ours, self.baseline, strict=True)]


def paired(
    ours: Callable[[], object],
    baseline: Callable[[], object],
    rounds: int,
    *,
    warmup: int = 1,
    clock: Callable[[], float] = time.process_time,
) -> Pairs:
    """Time `rounds` interleaved pairs (order swapped every other pair) after `warmup` untimed ones.

    The clock counts CPU seconds of this process and all its threads, children not included: what a core pays, however
    busy the others. For a GPU pass one that synchronizes.
    """
    assert rounds >= 2, "an interquartile range needs two rounds"
    for _ in range(warmup):
        ours()
        baseline()
    times: dict[int, list[float]] = {0: [], 1: []}
    for i in range(rounds):
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            start = clock()
            (ours, baseline)[which]()
            times[which].append(clock() - start)
    return Pairs(tuple(times[0]), tuple(times[1]))


def machine() -> dict[str, str | int]:
    """What the numbers were measured on: CPU model, cores, python, torch where it is installed."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    found: dict[str, str | int] = {"cpu": model, "cores": os.cpu_count() or 0, "python": platform.python_version()}
    try:
        import torch
    except ImportError:
        return found
    found["torch"] = str(torch.__version__)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def print_table(title: str, columns: list[str], rows: list[list[object]]) -> None:
    """A plain table on stdout; the first column is text, the others are right-aligned."""
    table = Table(*columns, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=120).print(table)


def summary(name: str, pairs: Pairs, *, ours: float, baseline: float, unit: str) -> dict[str, object]:
    """The record of one comparison: `ours` and `baseline` in `unit`, the pairs' median ratio and its quartiles."""
    low, ratio, high = statistics.quantiles(pairs.ratios, n=4, method="inclusive")
    return {
        "name": name,
        "ours": round(ours, 4),
        "baseline": round(baseline, 4),
        "unit": unit,
        "ratio": round(ratio, 4),
        "iqr": [round(low, 4), round(high, 4)],
        "pairs": len(pairs.ours),
    }


def print_json(record: dict[str, object]) -> None:
    """The one machine-readable line that a benchmark ends with; the machine is added."""
    print(json.dumps(record | {"machine": machine()}), flush=True)
