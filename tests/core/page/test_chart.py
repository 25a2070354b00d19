"""Charts: what is drawn, what is not, and numbers in few characters."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest

from pretrain.core.page.chart import chart, compact, points, ticks

NOISY = [(float(step), 1 / step + 0.1 * math.sin(7 * step)) for step in range(1, 1000)]


def polylines(text: str) -> list[list[tuple[float, float]]]:
    tree = ElementTree.fromstring(text)
    found = [line.attrib["points"].split() for line in tree.iter() if line.tag.endswith("polyline")]
    return [[(float(x), float(y)) for x, y in (place.split(",") for place in places)] for places in found]


def test_one_point_is_no_curve():
    assert not chart("loss", {"loss": [(1, 0.5)], "other": []})
    assert not chart("loss", {"loss": [(1, 0.5), (1, 0.7)]})
    assert not chart("loss", {"loss": [(1, 0.5), (2, math.nan), (3, math.inf)]})
    assert len(polylines(chart("loss", {"loss": [(1, 0.5), (2, 0.4)], "other": [(1, 3.0)]}))) == 1


def test_a_line_spans_the_width_and_falls_when_values_fall():
    ((left, top), *_, (right, bottom)) = polylines(chart("loss", {"loss": [(10, 2.0), (15, 1.5), (20, 1.0)]}))[0]
    assert left == 0 and right == 372 and top < bottom


def test_many_noisy_points_become_few_and_keep_their_peak():
    peak = [*NOISY, (1000.0, 1.05)]
    raw, mean = polylines(chart("loss", {"loss": peak}))
    assert len(raw) <= 480 and len(mean) <= 480
    assert raw[-1][1] < mean[-1][1] - 5, "the last point is a peak above the mean"


def test_a_few_outliers_do_not_flatten_a_curve():
    spiked = [(x, 500.0 if x == 3 else y) for x, y in NOISY]
    heights = [y for _, y in polylines(chart("loss", {"loss": spiked}))[1][-200:]]
    assert max(heights) - min(heights) > 3
    assert min(y for _, y in polylines(chart("loss", {"loss": spiked}))[0]) < 0, "the outlier leaves the chart"


def test_alarms_and_reference_values_are_in_the_chart_and_names_are_escaped():
    text = chart("a<b", {"<i>": [(0, 0.1), (9, 0.2)]}, levels={"raw & old": 0.05}, marks=[(4, "1"), (20, "2")])
    assert "a&lt;b" in text and "&lt;i&gt;" in text and "raw &amp; old" in text
    assert text.count('line class="mark"') == 1 and "stroke-dasharray" in text
    ElementTree.fromstring(text)


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e-12, 1e12])
def test_a_constant_of_any_size_is_drawn(value: float):
    assert len(polylines(chart("flat", {"flat": [(1, value), (2, value)]}))) == 1


def test_ticks_are_round_numbers_within_their_range():
    assert ticks(0, 900) == [0, 200, 400, 600, 800]
    assert ticks(0.131, 0.168, most=4) == [0.14, 0.15, 0.16]
    assert ticks(0, 2e-5, most=4) == [0, 5e-6, 1e-5, 1.5e-5, 2e-5]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (12500, "12.5k"),
        (2e-5, "2e-5"),
        (0.6105, "0.611"),
        (1234.4, "1234"),
        (3.2e6, "3.2M"),
        (174.4, "174"),
    ],
)
def test_numbers_take_few_characters(value: float, text: str):
    assert compact(value) == text


def test_values_that_are_no_numbers_are_no_points():
    rows = [{"step": step, "a": value} for step, value in enumerate(["x", True, 10**400, 0.5, None])] + [{"step": 9}]
    assert points(rows, "a") == [(3, 0.5)] and compact(0.108, percent=True) == "10.8%"
