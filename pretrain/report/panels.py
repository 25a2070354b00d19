"""The parts of the page of a run: numbers first, what happened, curves, pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pretrain.core.files import open_file
from pretrain.core.page import elements
from pretrain.core.page.chart import Points, chart, charts, compact
from pretrain.core.text import html
from pretrain.report.recorded import PIXELS, UNTRAINED, Event, Recorded

_EVENTS = 60  # on the time line
_WIDEST, _NARROWEST = 1200, 400  # pixels of a picture on the page
_TALL = 0.8  # width over height of pictures that are shown in narrow columns
Curve = tuple[str, Sequence[str], bool]  # title, names of values, fractions or not

LEARNING: tuple[Curve, ...] = (
    ("loss", ["loss"], False),
    ("learning rate", ["lr"], False),
    ("gradient norm", ["grad_norm"], False),
)
SIGNS: tuple[Curve, ...] = (
    ("directions that features use (RankMe)", ["doctor/rankme"], False),
    ("spread of features", ["doctor/std_min", "doctor/std_median", "doctor/std_max"], False),
    ("entropy of the last attention (1: uniform)", ["doctor/attention_entropy"], False),
    ("change of weights per step", ["doctor/weight_change", "doctor/weight_change_max"], False),
    ("distance of teacher and student", ["doctor/average_distance"], False),
    ("weight decay", ["weight_decay"], False),
)
MACHINE: tuple[Curve, ...] = (
    ("images per second", ["images_per_second"], False),
    ("time spent waiting for data", ["data_wait"], True),
    ("samples that could not be read", ["bad_samples"], False),
)
_KINDS = {
    "alarm": "alarm", "rewound": "rewound", "skipped": "not finite", "stopped": "stopped", "resumed": "resumed",
    "released": "released",
}  # fmt: skip


def cards(run: Recorded) -> str:
    """The numbers that a reader looks for first."""
    found: list[tuple[str, str, str]] = []
    best = max(run.probes, key=lambda name: run.last(name) or 0.0, default=None)
    if best is not None and (value := run.last(best)) is not None:
        kind, _, part = best.partition("/")
        beside = {"untrained": run.at(UNTRAINED, best), "raw pixels": run.last(f"{kind}/{PIXELS}")}
        known = [f"{name} {compact(number, percent=True)}" for name, number in beside.items() if number is not None]
        title = f"{'kNN' if kind == 'knn' else kind} accuracy, {part}"
        found.append((title, compact(value, percent=True), ", ".join(known)))
    total, waited = run.seconds
    share = "" if not run.total_steps else f"of {run.total_steps:,}"
    found.append(("step", f"{run.step:,}", share))
    if (loss := run.last("loss")) is not None:
        start = run.points("loss")[0][1]
        found.append(("loss", compact(loss), f"{compact(start)} at the start"))
    if run.images:
        found.append(("images seen", compact(run.images), ""))
    if total:
        found.append(("time", duration(total), f"{waited / total:.0%} waiting for data"))
        unit = "CPU process" if run.device == "cpu" else "GPU"
        found.append((f"{unit} hours", compact(total * run.ranks / 3600), f"{run.ranks} x {run.device}"))
        found.append(("images per second", compact((run.images or 0.0) / total), "mean"))
    boxes = "".join(_card(*one, first=not place) for place, one in enumerate(found))
    return f'<section><div class="cards">{boxes}</div>{_progress(run)}</section>'


def _card(name: str, value: str, more: str, *, first: bool) -> str:
    kind = "card first" if first else "card"
    return f'<div class="{kind}">{html(name)}<b>{html(value)}</b><small>{html(more)}</small></div>'


def _progress(run: Recorded) -> str:
    if not run.total_steps or run.step >= run.total_steps:
        return ""
    return f'<div class="progress"><i style="width:{run.step / run.total_steps:.1%}"></i></div>'


def time_line(run: Recorded) -> str:
    """The verdicts of the doctor, and what else happened, in words and in order of step."""
    alarms = [event for event in run.events if event.kind == "alarm"]
    measured = sum(any(name.startswith("doctor/") for name in row) for row in run.rows)
    if alarms:
        title, kind = f"The doctor raised {len(alarms)} alarm{'s' if len(alarms) > 1 else ''}", "bad"
    elif measured:
        title, kind = "The doctor found nothing wrong", "good"
    else:
        title, kind = "The doctor was not on", ""
    said = f"{measured} measurements up to step {run.step:,}" if measured else "its rules, on the log of the run:"
    numbers = dict(numbered(run))
    lines = [_event(event, numbers.get(event)) for event in run.events[:_EVENTS]]
    if len(run.events) > _EVENTS:
        lines.append(f'<li class="pale">and {len(run.events) - _EVENTS} more, in log.txt</li>')
    command = html(f"fovea doctor {run.folder}")
    return (
        f'<section class="{kind}"><h2>{title}</h2><div class="pale path">{said} <code>{command}</code></div>'
        f'<ol class="timeline">{"".join(lines)}</ol></section>'
    )


def numbered(run: Recorded) -> list[tuple[Event, str]]:
    """The alarms with their numbers on the time line and in the charts."""
    alarms = [event for event in run.events if event.kind == "alarm"]
    return [(event, str(number)) for number, event in enumerate(alarms, start=1)]


def _event(event: Event, number: str | None) -> str:
    text = html(event.text)
    if number is not None:
        title, colon, rest = text.partition(":")
        text = f"<b>{title}</b>{colon}{rest}"
    badge = f'<i class="number">{number}</i>' if number is not None else "<i></i>"
    return (
        f'<li class="{html(event.kind)}">{badge}<span class="when">step {event.step:,}</span><span>{text}</span></li>'
    )


def curves(run: Recorded, title: str, wanted: Sequence[Curve], *, folded: bool = False) -> str:
    """A section of charts; empty without curves. folded: behind its title."""
    marks = [(event.step, number) for event, number in numbered(run)]
    drawn = charts([
        chart(name, lines, percent=percent, marks=marks)
        for name, names, percent in wanted
        if _vary(lines := {short(one): run.points(one) for one in names})
    ])  # fmt: skip
    if not drawn:
        return ""
    if folded:
        return f"<section><details><summary>{html(title)}</summary>{drawn}</details></section>"
    return f"<section><h2>{html(title)}</h2>{drawn}</section>"


def _vary(lines: Mapping[str, Points]) -> bool:
    """Whether there is something to see: a weight decay that never changes is in the configuration."""
    return any(len({value for _, value in line}) > 1 for line in lines.values())


def learning(run: Recorded) -> str:
    """Loss, accuracy of the probes beside raw pixels, learning rate, gradients."""
    marks = [(event.step, number) for event, number in numbered(run)]
    drawn = [chart("loss", {"loss": run.points("loss")}, marks=marks)]
    for kind, title in (("knn", "kNN accuracy of frozen features"), ("linear", "linear accuracy of frozen features")):
        names = [name for name in run.probes if name.startswith(f"{kind}/")]
        pixels = run.last(f"{kind}/{PIXELS}")
        levels = {} if pixels is None else {"raw pixels": pixels}
        lines = {short(name): run.points(name) for name in names}
        drawn.append(chart(title, lines, levels=levels, percent=True, marks=marks))
    parts = _parts_of_the_loss(run)
    for title, names, percent in (("parts of the loss", parts, False), *LEARNING[1:]):
        drawn.append(chart(title, {name: run.points(name) for name in names}, percent=percent, marks=marks))
    found = charts(drawn)
    return f"<section><h2>Learning</h2>{found}</section>" if found else ""


def others(run: Recorded) -> list[Curve]:
    """A chart for each group of values that no other part shows: "grad", "keys_90", ... of the doctor; single ones."""
    shown = {one for _, names, _ in (*LEARNING, *SIGNS, *MACHINE) for one in names} | set(_parts_of_the_loss(run))
    groups: dict[str, list[str]] = {}
    for name in run.names:
        if name not in shown and not name.startswith(("knn/", "linear/")):
            short_name = name.removeprefix("doctor/")
            groups.setdefault(short_name.partition("/")[0] if "/" in short_name else short_name, []).append(name)
    return [(group, names, False) for group, names in groups.items()]


def _parts_of_the_loss(run: Recorded) -> list[str]:
    return [name for name in run.names if "loss" in name and name != "loss"]


def short(name: str) -> str:
    """The last part of a name: "knn/cls" as "cls"."""
    return name.rpartition("/")[2]


def strips(run: Recorded) -> tuple[str, list[str]]:
    """The pictures over time, a strip for each name; and what could not be shown, as sentences."""
    found, problems = "", []
    for name, listed in run.pictures.items():
        drawn: list[tuple[str, np.ndarray]] = []
        for step, path in listed:
            try:
                drawn.append(("the newest" if step is None else f"step {step:,}", _pixels(path)))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # PIL, of damaged files
                problems.append(f"{path.relative_to(run.folder)} cannot be shown: it is damaged")
        if drawn:
            height, width = drawn[0][1].shape[:2]
            kind = "strip narrow" if width < _TALL * height else "strip"
            figures = "".join(elements.photo(f"{name}, {when}", picture, html(when)) for when, picture in drawn)
            found += f'<section><h2>{html(name.replace("-", " "))}</h2><div class="{kind}">{figures}</div></section>'
    return found, problems


def _pixels(path: Path) -> np.ndarray:
    """uint8 [h, w, 3]: small pictures enlarged by whole pixels, large ones reduced."""
    with open_file(path) as file, Image.open(file) as image:
        picture = image.convert("RGB")
    if picture.width > _WIDEST:
        picture.thumbnail((_WIDEST, 10 * _WIDEST))
    factor = -(-_NARROWEST // picture.width)
    if factor > 1 and picture.height * factor < 10 * _WIDEST:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    return np.asarray(picture)


def setup(run: Recorded, facts: Mapping[str, str]) -> str:
    """How the run was made: facts, its starts, its configuration, the end of its log."""
    told = [[str(start.get(key, "?")) for key in ("time", "world_size", "device", "command")] for start in run.starts]
    starts = "\n".join(f"{when}  {ranks} x {device}  {command}" for when, ranks, device, command in told)
    long = {"configuration": run.config_text, "starts": starts, "end of the log": "\n".join(run.said[-_EVENTS:])}
    return elements.facts("The run", {**facts, **{name: f"{text}\n" for name, text in long.items() if text}})


def duration(seconds: float) -> str:
    """3725 as "1 h 02 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
