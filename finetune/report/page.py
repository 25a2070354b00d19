"""One HTML page about a run: no server, no network, no script; all pictures are embedded, nothing else is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from finetune.metrics.metric import Scores
from finetune.report import curves, tables
from pretrain.core.page import elements
from pretrain.core.page.chart import chart, charts, points
from pretrain.core.text import html

_LINES = 100  # of findings, per set


@dataclass(frozen=True)
class Drawn:
    """A prediction drawn on its image: uint8 [h, w, 3], the name of the image, its quality (higher is better)."""

    name: str
    quality: float
    picture: np.ndarray


@dataclass(frozen=True)
class Page:
    """The content of the page.

    Args:
        title: the run. subtitle: model and data, one line.
        worst, best: the worst and the best first.
        rows: of metrics.jsonl.
        explained: maps of what predictions depend on, by the name of the image. checks: lines about these maps.
        findings: lines about the annotations, by the name of the set.
        facts: name and value; a value of several lines (a configuration, a match report) is collapsed.
        warnings: shown before the numbers.
    """

    title: str
    subtitle: str
    scores: Scores
    classes: Sequence[str]
    worst: Sequence[Drawn] = ()
    best: Sequence[Drawn] = ()
    rows: Sequence[Mapping[str, float]] = ()
    explained: Sequence[tuple[str, np.ndarray]] = ()
    checks: Sequence[str] = ()
    findings: Mapping[str, Sequence[str]] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()


def render(page: Page) -> str:
    """The page as one HTML text."""
    parts = [_header(page), _pictures(page), _explained(page), _classes(page), _figures(page), _history(page)]
    parts.append(_findings(page))
    body = "\n".join([*(part for part in parts if part), elements.facts("The run", page.facts)])
    return elements.document(page.title, body)


def _header(page: Page) -> str:
    return (
        f"{elements.header(page.title, page.subtitle, page.warnings)}"
        f"<section>{_numbers(page.scores)}"
        f'<div class="pale">How it was measured: {html(page.scores.protocol)}</div></section>'
    )


def _numbers(scores: Scores) -> str:
    """A card for each number; if there are many of a kind, a card for the first of each kind and a table of all."""
    grouped, shown, table = tables.grouped(scores.values), dict(scores.values), ""
    if grouped is not None:
        columns, rows = grouped
        shown = {f"{group} {columns[0]}": row[columns[0]] for group, row in rows.items()}
        table = elements.table(
            ["", *columns], [[group, *(row[name] for name in columns)] for group, row in rows.items()]
        )
    first = next(iter(shown))
    cards = "".join(
        f'<div class="card{" first" if name == first else ""}">{html(name)}<b>{elements.number(value)}</b></div>'
        for name, value in shown.items()
    )
    return f'<div class="cards">{cards}</div>{table}'


def _pictures(page: Page) -> str:
    sections = []
    for title, kind, drawn in (("Worst predictions", "bad", page.worst), ("Best predictions", "good", page.best)):
        if drawn:
            figures = "".join(_picture(one, place) for place, one in enumerate(drawn, start=1))
            sections.append(f'<section class="{kind}"><h2>{title}</h2><div class="pictures">{figures}</div></section>')
    return "".join(sections)


def _picture(drawn: Drawn, place: int) -> str:
    caption = f"{place}. {html(drawn.name)} <span class='pale'>quality {elements.number(drawn.quality)}</span>"
    return elements.photo(drawn.name, drawn.picture, caption)


def _explained(page: Page) -> str:
    """Maps of what predictions depend on, beside maps that know nothing of the network."""
    if not page.explained and not page.checks:
        return ""
    lines = "".join(f"<li>{html(line)}</li>" for line in page.checks)
    drawn = "".join(elements.photo(name, picture, html(name)) for name, picture in page.explained)
    return f'<section><h2>What predictions depend on</h2><ul>{lines}</ul><div class="pictures">{drawn}</div></section>'


def _classes(page: Page) -> str:
    rows = tables.worst_first(page.scores)
    if not rows:
        return ""
    columns, ranked = tables.columns_of(rows), tables.sort_column(page.scores)
    listed = elements.table(columns, [[row.get(name) for name in columns] for row in rows], bar=ranked)
    table = f'<div class="scroll">{listed}</div>'
    wrong = "" if page.scores.confusion is None else _mistakes(page.scores.confusion, page.classes)
    order = f"the lowest {html(ranked)} first" if ranked else "in their order"
    both = f'<div class="side"><div>{table}</div>{wrong}</div>'
    return f'<section><h2>By class</h2><div class="pale">{order}</div>{both}</section>'


def _mistakes(confusion: np.ndarray, classes: Sequence[str]) -> str:
    if len(confusion) != len(classes) or not (found := tables.mistakes(confusion, classes)):
        return ""
    rows = "".join(
        f'<tr><td class="text">{html(true)}</td><td class="text">{html(taken)}</td>'
        f"<td>{count:,} of {total:,}</td><td>{count / max(total, 1):.0%}</td></tr>"
        for true, taken, count, total in found
    )
    head = "<tr><th>is</th><th class='text'>taken for</th><th></th><th></th></tr>"
    return f"<div><h2>Most frequent mistakes</h2><table>{head}{rows}</table></div>"


def _figures(page: Page) -> str:
    found = []
    if page.scores.confusion is not None and len(page.scores.confusion) == len(page.classes):
        found.append(("Confusion matrix", curves.confusion_figure(page.scores.confusion, page.classes)))
    for name, series in (page.scores.curves or {}).items():
        if series:
            found.append((name, curves.precision_recall_figure(series)))
    drawn = "".join(f"<div><h2>{html(name)}</h2>{elements.figure(name, png)}</div>" for name, png in found)
    return f'<section class="side">{drawn}</section>' if drawn else ""


def _history(page: Page) -> str:
    names = list(dict.fromkeys(name for row in page.rows for name in row))
    losses = [name for name in names if "loss" in name][:6]
    measured = [name for name in names if name.startswith("val/")]
    primary = page.scores.primary[0]
    chosen = [name for name in measured if name.rsplit("/", 1)[-1] == primary] or measured[:4]
    groups = (("loss", losses), ("on the validation set", chosen), ("learning rate", ["lr"]))
    drawn = charts([chart(title, {name: points(page.rows, name) for name in series}) for title, series in groups])
    return f"<section><h2>Training</h2>{drawn}</section>" if drawn else ""


def _findings(page: Page) -> str:
    given = {name: lines for name, lines in page.findings.items() if lines}
    if not given:
        return ""
    lists = "".join(
        f"<h3>{html(name)}</h3><pre>{html(_first(lines), lines=True)}</pre>" for name, lines in given.items()
    )
    return f'<section class="warn"><h2>Problems in the data</h2>{lists}</section>'


def _first(lines: Sequence[str]) -> str:
    more = len(lines) - _LINES
    return "\n".join([*lines[:_LINES], *([f"... and {more} more"] if more > 0 else [])])
