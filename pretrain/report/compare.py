"""A page that compares runs: their numbers, the differences of their configurations, their curves over each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pretrain.core.page import elements
from pretrain.core.page.chart import chart, charts, compact
from pretrain.core.page.colours import colour, hexadecimal
from pretrain.core.text import html
from pretrain.report import panels
from pretrain.report.recorded import Recorded

_CURVES = ("loss", "lr", "grad_norm", "doctor/rankme", "doctor/attention_entropy", "images_per_second", "data_wait")
_FRACTIONS = ("knn/", "linear/", "data_wait")


def render(runs: Sequence[Recorded]) -> str:
    """The page as one HTML text; two or more runs."""
    names = distinct([run.folder.resolve() for run in runs])
    problems = [f"{name}: {problem}" for name, run in zip(names, runs, strict=True) for problem in run.problems]
    subtitle = f"{', '.join(names)}"
    parts = [
        elements.header(f"{len(runs)} runs compared", subtitle, problems),
        f"<section><h2>Where their configurations differ</h2>{_differences(names, runs)}</section>",
        f"<section><h2>Their numbers</h2>{_numbers(names, runs)}</section>",
        _curves(names, runs),
    ]
    return elements.document("runs compared", "\n".join(parts))


def distinct(folders: Sequence[Path]) -> list[str]:
    """The parts of paths that tell them apart: a/x/run and a/y/run are x and y."""
    parts = [folder.parts for folder in folders]
    if len(set(parts)) < len(parts):
        return [f"{number}. {folder.name}" for number, folder in enumerate(folders, start=1)]
    while all(len(one) > 1 for one in parts) and len({one[0] for one in parts}) == 1:
        parts = [one[1:] for one in parts]
    while all(len(one) > 1 for one in parts) and len({one[-1] for one in parts}) == 1:
        parts = [one[:-1] for one in parts]
    return ["/".join(one) for one in parts]


def _differences(names: Sequence[str], runs: Sequence[Recorded]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.config if key != "run_dir"))
    rows = [[key, *(_value(run, key) for run in runs)] for key in keys]
    different = [row for row in rows if len(set(row[1:])) > 1]
    equal = f'<div class="pale">{len(rows) - len(different)} keys are equal, run_dir is left out</div>'
    if not different:
        return f"<p>They do not differ.</p>{equal}"
    return f'<div class="scroll">{elements.table(["key", *names], different)}</div>{equal}'


def _value(run: Recorded, key: str) -> str:
    if not run.config:
        return "unreadable"
    return json.dumps(run.config[key], default=str) if key in run.config else "not set"


def _numbers(names: Sequence[str], runs: Sequence[Recorded]) -> str:
    probes = list(dict.fromkeys(name for run in runs for name in run.probes))
    columns = ["run", "step", "loss", *probes, "images", "images/s", "waiting", "time", "process hours", "alarms"]
    rows = []
    for place, (name, run) in enumerate(zip(names, runs, strict=True)):
        total, waited = run.seconds
        numbers = [
            f"{run.step:,}",
            _compact(run.last("loss")),
            *(_compact(run.last(probe), percent=True) for probe in probes),
            _compact(run.images),
            _compact((run.images or 0.0) / total if total else None),
            _compact(waited / total if total else None, percent=True),
            panels.duration(total) if total else "–",  # noqa: RUF001
            _compact(total * run.ranks / 3600 if total else None),
            str(sum(event.kind == "alarm" for event in run.events)),
        ]
        swatch = f'<i class="swatch" style="background:{_tint(place)}"></i>'
        rows.append(f"<tr><td>{swatch}{html(name)}</td>{''.join(f'<td>{html(text)}</td>' for text in numbers)}</tr>")
    head = "".join(f"<th>{html(name)}</th>" for name in columns)
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _curves(names: Sequence[str], runs: Sequence[Recorded]) -> str:
    """Over the step, or over the images seen where the batches differ."""
    batches = [run.number("optim.global_batch_size") for run in runs]
    by_images = len(set(batches)) > 1 and None not in batches
    probes = list(dict.fromkeys(name for run in runs for name in run.probes))
    wanted = [_CURVES[0], *probes, *_CURVES[1:]]
    drawn = []
    for value in wanted:
        lines = {
            name: [(x * batch if by_images and batch else x, y) for x, y in run.points(value)]
            for name, run, batch in zip(names, runs, batches, strict=True)
        }
        tints = {name: _tint(place) for place, name in enumerate(names)}
        percent, xlabel = value.startswith(_FRACTIONS), "images seen" if by_images else "step"
        drawn.append(chart(value, lines, tints=tints, percent=percent, xlabel=xlabel))
    found = charts(drawn)
    return f"<section><h2>Their curves</h2>{found}</section>" if found else ""


def _tint(place: int) -> str:
    return hexadecimal(colour(place))


def _compact(value: float | None, *, percent: bool = False) -> str:
    return "–" if value is None else compact(value, percent=percent)  # noqa: RUF001
