"""The study as a table of text, as JSON, and as one HTML page without a script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from finetune.attention import panels
from finetune.attention.choices import Comparison, Use
from finetune.attention.study import WAYS, Cost, Row, Study
from finetune.report.curves import as_png
from pretrain.core.page import elements
from pretrain.core.text import html

COLUMNS = ("image dependence", "entropy", "Hoyer", "keys for 90 %", "distance", "active", "dead")
MEANING = """
Image dependence: the share of the variance of the weights that is between images; 0: the same weights for each image.
Entropy: over log of the number of keys (or branches); 1: uniform. Hoyer: sparsity of the weights, 0 to 1. Keys for 90
%: the share of the keys that hold 90 % of the attention of a query. Distance: in patches, from a patch to what it
attends to. Active: the share of the hidden units of an MLP that are active for a token; dead: of those that no token
activates; active is not 0 after ReLU, its square or top-k, else above 1 % of the root mean square. Frozen: each image
gets the mean weights over all images. Shuffled: each gets those of another image. Uniform: all weights are equal. The
numbers are the accuracy that is lost, with the interval of 95 % over resampled images; where the interval of "frozen"
is not above 0, no cost was seen: by these images, the module computes a fixed mixing.
"""


def as_json(
    study: Study, facts: dict[str, str], uses: Sequence[Use] = (), compared: Sequence[Comparison] = ()
) -> dict[str, Any]:
    """Everything but the mean weights.

    Args:
        uses, compared: of the branches of general blocks; none: the network has no such block.
    """
    return {
        **facts,
        "images": study.images,
        "accuracy": study.accuracy,
        "modules": [
            {
                "name": row.name,
                "kind": row.kind,
                "verdict": row.verdict,
                "statistics": dict(zip(COLUMNS, _numbers(row), strict=True)) if row.measured or row.sparsity else None,
                "costs": {way: vars(cost) for way, cost in row.costs.items()},
            }
            for row in study.rows
        ],
        **panels.as_json(uses, compared),
    }


def as_text(study: Study, uses: Sequence[Use] = (), compared: Sequence[Comparison] = ()) -> str:
    """A line per module; then one per general block and comparison."""
    header = ["module", *COLUMNS, *(f"{way}: lost" for way in study.ways), ""]
    lines = [header, *([row.name, *_cells(row, study.ways), row.verdict] for row in study.rows)]
    rows = panels.rows(uses, compared)
    return _aligned(lines) + ("\n\n" + _aligned([list(panels.COLUMNS), *rows]) if rows else "")


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def as_html(
    study: Study,
    facts: dict[str, str],
    grid: tuple[int, int] | None,
    uses: Sequence[Use] = (),
    compared: Sequence[Comparison] = (),
) -> str:
    """The page."""
    ways = study.ways
    cards = f'<div class="card">images<b>{study.images}</b></div>'
    if study.accuracy is not None:
        cards = f'<div class="card first">accuracy<b>{study.accuracy:.3f}</b></div>{cards}'
    figures = [("What freezing, shuffling and uniform weights cost", _costs_figure(study))] if ways else []
    if grid is not None and (maps := _maps_figure(study, grid)) is not None:
        figures.append(("Mean attention over the images, of the first token (all heads)", maps))
    drawn = "".join(
        f"<section><h2>{html(title)}</h2>{elements.figure(title, as_png(figure))}</section>"
        for title, figure in figures
    )
    body = (
        elements.header("Does it attend?", facts["network"])
        + f'<section><div class="cards">{cards}</div></section>{drawn}'
        + (f"<section><h2>Costs by module</h2>{_costs_table(study.rows, ways)}</section>" if ways else "")
        + _statistics("The weights of each module", [row for row in study.rows if row.sparsity is None])
        + _statistics("Hidden units of the MLPs", [row for row in study.rows if row.sparsity is not None])
        + f"<section><h2>What the columns mean</h2><p>{html(' '.join(MEANING.split()))}</p></section>"
        + panels.section(uses, compared)
        + elements.facts("Measured", facts)
    )
    return elements.document("Attention", body)


def _costs_table(rows: Sequence[Row], ways: Sequence[str]) -> str:
    columns = ["module", *(f"{way}: lost" for way in ways), "verdict"]
    return elements.table(columns, [[row.name, *_lost(row, ways), row.verdict] for row in rows if row.costs])


def _statistics(title: str, rows: Sequence[Row]) -> str:
    """A section of those columns that one of the rows has; no rows: nothing."""
    numbers = {row.name: _numbers(row) for row in rows if row.measured or row.sparsity}
    used = [place for place in range(len(COLUMNS)) if any(of[place] is not None for of in numbers.values())]
    if not used:
        return ""
    columns = ["module", *(COLUMNS[place] for place in used)]
    table = elements.table(columns, [[name, *(of[place] for place in used)] for name, of in numbers.items()])
    return f"<section><h2>{html(title)}</h2>{table}</section>"


def _numbers(row: Row) -> list[float | None]:
    found = row.measured
    numbers: tuple[float | None, ...] = (None,) * len(COLUMNS)
    if row.sparsity is not None:
        numbers = (None, None, row.sparsity.hoyer, None, None, row.sparsity.active, row.sparsity.dead)
    elif found is not None:
        numbers = (found.dependence, found.entropy, found.hoyer, found.tokens_for_mass, found.distance, None, None)
    return [None if number is None or math.isnan(number) else number for number in numbers]


def _cells(row: Row, ways: Sequence[str]) -> list[str]:
    numbers = ["" if number is None else f"{number:.3f}" for number in _numbers(row)]
    return [*numbers, *_lost(row, ways)]


def _lost(row: Row, ways: Sequence[str]) -> list[str]:
    return [_interval(row.costs[way]) if way in row.costs else "" for way in ways]


def _interval(cost: Cost) -> str:
    return f"{cost.lost:+.3f} [{cost.low:+.3f}, {cost.high:+.3f}]"


def _costs_figure(study: Study) -> Figure:
    rows = [row for row in study.rows if row.costs]
    figure = Figure(figsize=(9, 1.2 + 0.42 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for number, (way, ink) in enumerate(zip(WAYS, ("#1f77dc", "#e65014", "#6e757d"), strict=True)):
        costs = [row.costs[way] for row in rows]
        places = np.arange(len(costs)) + 0.25 * (number - 1)
        spread = np.array([[max(c.lost - c.low, 0) for c in costs], [max(c.high - c.lost, 0) for c in costs]])
        axes.errorbar([c.lost for c in costs], places, xerr=spread, fmt="o", color=ink, label=way, markersize=4)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="#212529", linewidth=0.8)
    axes.set_xlabel("accuracy lost")
    figure.legend(loc="outside upper right", ncols=len(WAYS), frameon=False)  # beside the intervals, never on them
    return figure


def _maps_figure(study: Study, grid: tuple[int, int]) -> Figure | None:
    """The mean attention of the first token to the patches, a picture per block; None: none attends over the grid."""
    shown: list[tuple[str, Tensor]] = []
    for row in study.rows:
        mean = None if row.measured is None or row.kind != "attention" else row.measured.mean
        if mean is not None and mean.ndim == 3 and mean.shape[2] >= math.prod(grid):
            shown.append((row.name, mean[:, 0, -math.prod(grid) :].mean(0).unflatten(0, grid)))
    if not shown:
        return None
    columns = min(len(shown), 6)
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(1.9 * columns, 2.2 * lines), layout="constrained")
    for number, (name, picture) in enumerate(shown, start=1):
        axes = figure.add_subplot(lines, columns, number)
        axes.imshow(picture.float().cpu().numpy(), cmap="viridis")
        axes.set_title(name, fontsize=8)
        axes.axis("off")
    return figure
