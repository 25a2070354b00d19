"""The results of a laboratory: JSON lines as they come, a table as Markdown and HTML at the end."""

from __future__ import annotations

import json
import platform
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from launch.lab.verdicts import HELD, VERDICTS, Result
from pretrain.core.files import write_text
from pretrain.core.text import html, markdown

RESULTS = "results.jsonl"


def read_results(out: Path) -> list[Result]:
    """The trials that have ended; a line cut by a kill is dropped."""
    path = out / RESULTS
    found: list[Result] = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            found.append(Result(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def append(out: Path, result: Result) -> None:
    with (out / RESULTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def machine() -> str:
    """Versions and machine, in one line, without the machine's name."""
    parts = [f"{name} {version(name)}" for name in ("fovea", "torch")]
    return ", ".join([*parts, f"Python {platform.python_version()}", f"{platform.system()} {platform.machine()}"])


def write_tables(out: Path, results: Sequence[Result], faults: Mapping[str, tuple[str, str]]) -> None:
    """Write table.md and table.html. faults: fault and promise by kind."""
    rows = _rows(results, faults)
    titles = ["kind", "fault", "what must hold", "trials", *VERDICTS]
    seeds = ", ".join(map(str, sorted({result.seed for result in results})))
    facts = f"{len(results)} trials, seeds {seeds}; {machine()}; {time.strftime('%Y-%m-%d')}"
    broken = [(f"{one.kind}:{one.number}:{one.seed}", one.verdict, one.why) for one in results if one.verdict != HELD]
    lines = [f"{markdown(facts)}", "", *_markdown(titles, rows)]
    if broken:
        lines += ["", *_markdown(["--replay", "verdict", "why"], broken)]
    write_text(out / "table.md", "\n".join(lines) + "\n")
    page = f"<p>{html(facts)}</p>{_html(titles, rows)}{_html(['--replay', 'verdict', 'why'], broken) if broken else ''}"
    style = "body{font:14px sans-serif}td,th{border:1px solid #ccc;padding:2px 6px;text-align:left}"
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Faults</title><style>{style}</style>'
    write_text(out / "table.html", f"{head}<h1>Faults</h1>{page}</html>\n")


def _rows(results: Iterable[Result], faults: Mapping[str, tuple[str, str]]) -> list[tuple[str, ...]]:
    counts: dict[str, Counter[str]] = {}
    for result in results:
        counts.setdefault(result.kind, Counter())[result.verdict] += 1
    rows: list[tuple[str, ...]] = []
    for kind in [*faults, *(counts.keys() - faults.keys())]:
        if kind in counts:
            numbers = [counts[kind].total(), *(counts[kind][verdict] for verdict in VERDICTS)]
            rows.append((kind, *faults.get(kind, ("", "")), *map(str, numbers)))
    return rows


def _markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [[markdown(cell) for cell in row] for row in (titles, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], f"|{'---|' * len(titles)}", *lines[1:]]


def _html(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{html(title)}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{html(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
