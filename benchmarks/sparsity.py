"""Accuracy of frozen features against the share of hidden units that are active: the picture of a comparison.

python -m benchmarks.compare configs/results/attention/sparsity_cifar10.yaml --out comparison
python -m benchmarks.sparsity comparison --plot docs/sparsity.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from scipy.stats import t

from benchmarks.compare import METRICS, UNITS

Scores = Mapping[str, np.ndarray]  # percent [seeds], by metric


def read(comparison: Path) -> dict[str, Scores]:
    """The scores of each arm of a comparison at equal steps.

    Raises:
        ValueError: there are none, or the network has no feed-forward networks.
    """
    found: dict[str, Scores] = {}
    for arm in sorted((comparison / "steps").glob("*")):
        rows = [json.loads(path.read_text()) for path in sorted(arm.glob("*/score.json"))]
        if missing := {name for row in rows for name in UNITS if name not in row}:
            raise ValueError(f"{arm}: its scores have no {' and '.join(sorted(missing))}; repeat the comparison")
        if rows:
            found[arm.name] = {name: 100 * np.array([row[name] for row in rows]) for name in (*METRICS, *UNITS)}
    if not found:
        raise ValueError(f"{comparison}: no scores of a comparison (steps/ARM/SEED/score.json)")
    return found


def table(found: Mapping[str, Scores]) -> str:
    """Markdown: means over the seeds, in percent."""
    lines = [f"| arm | active | Hoyer | {' | '.join(METRICS.values())} |", "| --- | --- | --- | --- | --- |"]
    for arm, scores in found.items():
        lines.append(f"| {arm} | " + " | ".join(f"{scores[name].mean():.1f}" for name in (*UNITS, *METRICS)) + " |")
    return "\n".join(lines)


def picture(found: Mapping[str, Scores]) -> Figure:
    """A panel for each metric: a point for each arm with the interval of 95 % of its mean (Student's t)."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    arms = sorted(found, key=lambda arm: found[arm]["active"].mean())
    panels = figure.subplots(1, len(METRICS))
    for axes, (metric, title) in zip(panels, METRICS.items(), strict=True):
        for arm in arms:
            values, x = found[arm][metric], found[arm]["active"].mean()
            half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0
            axes.errorbar(x, values.mean(), yerr=half, fmt="o", capsize=3, label=f"{arm} ({x:.0f} %)")
        axes.set(xscale="log", xlabel="active hidden units, % of a token's", ylabel=f"{title} accuracy, %")
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50, 100]))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def main() -> int:
    """Exit status 2: there are no scores."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparsity", description=__doc__)
    parser.add_argument("comparison", type=Path, help="folder that `python -m benchmarks.compare` wrote")
    parser.add_argument("--plot", type=Path)
    chosen = parser.parse_args()
    try:
        found = read(chosen.comparison)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(found))
    if chosen.plot:
        picture(found).savefig(chosen.plot, dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
