"""A line chart as SVG within the page: sharp at any width, without script; values under the pointer as titles."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import TypeGuard

from pretrain.core.page.colours import colour, hexadecimal
from pretrain.core.text import html

Points = Sequence[tuple[float, float]]
_Place = Callable[[float, float], tuple[float, float]]

_WIDTH, _HEIGHT = 440, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 18, 34
_INNER_WIDTH, _INNER_HEIGHT = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
_MANY = 40  # points of a line that may be noisy: drawn pale, with its running mean
_TURNS = 0.1  # of the points of a noisy line are higher or lower than both neighbours
_DOT = 4  # pixels left and right of the plot for the dots at its ends
_DOTS = 20  # up to this number, each point is a dot
_DRAWN = 240  # points per line: more than pixels between them help nobody
_MARK_WIDTH = 13
_UNITS = ((1e9, "G"), (1e6, "M"), (1e4, "k"))


def chart(
    title: str,
    lines: Mapping[str, Points],
    *,
    levels: Mapping[str, float] | None = None,
    marks: Sequence[tuple[float, str]] = (),
    tints: Mapping[str, str] | None = None,
    percent: bool = False,
    xlabel: str = "step",
) -> str:
    """A chart with its title and legend; empty if no line has two points, as one point is no curve.

    Args:
        lines: (x, y) by name, in order of x. Values that are not finite are left out.
        levels: dashed lines of one value, by name.
        marks: (x, label): numbered vertical lines, such as the alarms of a run.
        tints: colours by name; default: one after the other.
        percent: values are fractions, shown as percentages.
    """
    finite = {name: [(x, y) for x, y in line if math.isfinite(x) and math.isfinite(y)] for name, line in lines.items()}
    drawn = {name: line for name, line in finite.items() if len({x for x, _ in line}) > 1}
    if not drawn:
        return ""
    known = {name: value for name, value in (levels or {}).items() if math.isfinite(value)}
    tints = tints or {name: hexadecimal(colour(place)) for place, name in enumerate([*drawn, *known])}
    low, high = _extent([y for line in drawn.values() for _, y in line], list(known.values()))
    first, last = min(line[0][0] for line in drawn.values()), max(line[-1][0] for line in drawn.values())

    def place(x: float, y: float) -> tuple[float, float]:
        return (x - first) / (last - first) * _INNER_WIDTH, (high - y) / (high - low) * _INNER_HEIGHT

    parts = [_line(name, [place(*point) for point in line], line, tints[name], percent) for name, line in drawn.items()]
    parts += [_level(place(first, value)[1], tints[name]) for name, value in known.items()]
    legend = [_entry(name, line[-1][1], f"background:{tints[name]}", percent) for name, line in drawn.items()]
    legend += [_entry(name, value, f"border-top:2px dashed {tints[name]}", percent) for name, value in known.items()]
    axes = _rows(low, high, place, first, percent) + _columns(first, last, place, low)
    signs = _marks([(place(x, low)[0], label) for x, label in marks if first <= x <= last])
    return (
        f'<div class="chart"><h3>{html(title)}</h3><div class="legend">{"".join(legend)}</div>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html(title)} over the {html(xlabel)}">'
        f'<g transform="translate({_LEFT} {_TOP})">{axes}{signs}'
        f'<svg x="-{_DOT}" width="{_INNER_WIDTH + 2 * _DOT}" height="{_INNER_HEIGHT}" overflow="hidden" '
        f'viewBox="-{_DOT} 0 {_INNER_WIDTH + 2 * _DOT} {_INNER_HEIGHT}">{"".join(parts)}</svg></g>'
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 3}" text-anchor="end">{html(xlabel)}</text></svg></div>'
    )


def points(rows: Sequence[Mapping[str, object]], name: str) -> Points:
    """(step, value) of the rows that have a number `name`."""
    found = ((row["step"], row.get(name)) for row in rows)
    return [(step, value) for step, value in found if is_number(step) and is_number(value)]


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number; an integer of a damaged file may be more than any float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def charts(drawn: Sequence[str]) -> str:
    """Charts side by side as far as there is room; empty without charts."""
    found = "".join(drawn)
    return f'<div class="charts">{found}</div>' if found else ""


def compact(value: float, *, percent: bool = False) -> str:
    """A number in few characters: 12500 as "12.5k", 0.00002 as "2e-5", as a percentage 0.108 as "10.8%"."""
    if percent:
        return f"{value * 100:.3g}%"
    for size, unit in _UNITS:
        if abs(value) >= size:
            divisor = 1e3 if unit == "k" else size
            return f"{value / divisor:.4g}{unit}" if abs(value) < 1e15 else f"{value:.2g}"
    if value and abs(value) < 1e-3:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def ticks(low: float, high: float, *, most: int = 5) -> list[float]:
    """At most `most` + 1 round numbers within [low, high]."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    start = math.ceil(low / step - 1e-9)
    return [
        round(step * i, 12 - math.floor(math.log10(step))) for i in range(start, math.floor(high / step + 1e-9) + 1)
    ]


def _extent(values: Sequence[float], levels: Sequence[float]) -> tuple[float, float]:
    """The values that are shown: all, without the outer hundredths where these alone take half of the height."""
    ordered = sorted(values)
    cut = len(ordered) // 100 if len(ordered) >= _MANY else 0
    inner = ordered[cut], ordered[-1 - cut]
    whole = ordered[0], ordered[-1]
    low, high = inner if whole[1] - whole[0] > 2 * (inner[1] - inner[0]) > 0 else whole
    low, high = min(low, *levels, high), max(high, *levels, low)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    floor = 0.0 if low >= 0 and low - margin < 0 else low - margin
    return floor, high + margin


def _entry(name: str, value: float, style: str, percent: bool) -> str:
    """A name of the legend, with its last value."""
    return f'<span><i style="{style}"></i>{html(name)} <b>{compact(value, percent=percent)}</b></span>'


def _line(name: str, places: Points, values: Points, tint: str, percent: bool) -> str:
    if not _is_noisy([y for _, y in places]):
        dots = "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{tint}">'
            f"<title>{html(name)} at {compact(step)}: {compact(value, percent=percent)}</title></circle>"
            for (x, y), (step, value) in zip(places, values, strict=True)
            if len(places) <= _DOTS
        )
        return _path(places if len(places) <= _DRAWN else _envelope(places), tint, 2) + dots
    width = max(3, len(places) // 20)
    means = list(zip([x for x, _ in places], _running_mean([y for _, y in places], width), strict=True))
    return _path(_envelope(places), tint, 1, opacity=0.35) + _path(means[:: max(1, len(means) // _DRAWN)], tint, 2)


def _is_noisy(values: Sequence[float]) -> bool:
    """Not a schedule, whose running mean would be another schedule."""
    turns = sum((b - a) * (c - b) < 0 for a, b, c in zip(values, values[1:], values[2:], strict=False))
    return len(values) >= _MANY and turns > _TURNS * len(values)


def _path(places: Points, tint: str, width: float, *, opacity: float = 1) -> str:
    points = " ".join(f"{x:.1f},{min(max(y, -1e4), 1e4):.1f}" for x, y in places)
    return (
        f'<polyline points="{points}" fill="none" stroke="{tint}" stroke-width="{width}" '
        f'stroke-opacity="{opacity}" stroke-linejoin="round"/>'
    )


def _envelope(places: Points) -> Points:
    """The highest and the lowest of each group of neighbours, so that no peak is lost."""
    size = max(1, 2 * len(places) // _DRAWN)
    if size < 3:
        return places
    groups = (places[start : start + size] for start in range(0, len(places), size))
    return [point for group in groups for point in sorted((min(group, key=_height), max(group, key=_height)))]


def _height(point: tuple[float, float]) -> float:
    return point[1]


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean over `width` neighbours, over fewer at the ends."""
    sums = [0.0, *accumulate(values)]
    half = width // 2
    ends = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in ends]


def _level(y: float, tint: str) -> str:
    style = f'stroke="{tint}" stroke-width="1.5" stroke-dasharray="5 4"'
    return f'<line x2="{_INNER_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" {style}/>'


def _rows(low: float, high: float, place: _Place, first: float, percent: bool) -> str:
    found = ""
    for value in ticks(low, high, most=4):
        y = place(first, value)[1]
        found += f'<line class="grid" x2="{_INNER_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
        found += f'<text x="-7" y="{y + 4:.1f}" text-anchor="end">{compact(value, percent=percent)}</text>'
    return found


def _columns(first: float, last: float, place: _Place, low: float) -> str:
    found = ""
    for value in ticks(first, last):
        x = place(value, low)[0]
        found += f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_INNER_HEIGHT}" y2="{_INNER_HEIGHT + 4}"/>'
        found += f'<text x="{x:.1f}" y="{_INNER_HEIGHT + 17}" text-anchor="middle">{compact(value)}</text>'
    return found


def _marks(places: Sequence[tuple[float, str]]) -> str:
    """Labels that would cover each other are left out; their lines are not."""
    found, free = "", -math.inf
    for x, label in places:
        found += f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="-4" y2="{_INNER_HEIGHT}"/>'
        if x >= free:
            found += f'<circle class="mark" cx="{x:.1f}" cy="-9" r="7"/>'
            found += f'<text class="mark" x="{x:.1f}" y="-5.5" text-anchor="middle">{html(label)}</text>'
            free = x + _MARK_WIDTH
    return found
