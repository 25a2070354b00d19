from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.core.schedule import closed_cosine, cosine, multistep, poly, teacher_temp, warmup, warmup_cosine


def test_open_warmup_meets_the_peak_one_step_after_the_closed_one():
    shape = {"peak": 1.0, "final": 0.0, "warmup_steps": 5, "total_steps": 20}
    assert [warmup_cosine(s, **shape) for s in range(6)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    closed = [warmup_cosine(s, **shape, warmup_form="closed") for s in range(6)]
    assert closed == pytest.approx([0, 0.25, 0.5, 0.75, 1.0, 1.0])


def test_without_warmup_the_first_step_is_at_the_peak():
    assert warmup_cosine(0, peak=3.0, final=1.0, warmup_steps=0, total_steps=4) == 3.0


def test_a_closed_warmup_of_one_step_starts_at_zero():
    shape = {"peak": 1.0, "final": 0.0, "warmup_steps": 1, "total_steps": 3}
    assert warmup_cosine(0, **shape, warmup_form="closed") == 0.0
    assert warmup_cosine(1, **shape, warmup_form="closed") == 1.0


@given(st.integers(1, 50), st.integers(0, 60), st.floats(0.0, 10.0), st.floats(0.0, 10.0))
def test_cosine_stays_between_its_ends_and_holds_the_last(total, extra, start, end):
    values = [cosine(s, start, end, total) for s in range(total + extra)]
    low, high = min(start, end), max(start, end)
    assert all(low - 1e-9 <= v <= high + 1e-9 for v in values)
    assert values[0] == pytest.approx(start)
    assert all(v == end for v in values[total:])


def test_teacher_temperature_reaches_its_value_in_the_last_warmup_epoch():
    temps = [teacher_temp(e, warmup_temp=0.04, temp=0.07, warmup_epochs=4) for e in range(6)]
    assert temps == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07])
    assert teacher_temp(0, warmup_temp=0.04, temp=0.07, warmup_epochs=0) == 0.07
    assert teacher_temp(0, warmup_temp=0.04, temp=0.07, warmup_epochs=1) == 0.04


lengths = st.integers(1, 40)
values = st.floats(0.0, 10.0)
forms = st.sampled_from(["open", "closed"])


@given(lengths, values, values, forms)
def test_a_warmup_is_a_straight_line_from_its_start_to_the_peak(steps, start, peak, form):
    line = [warmup(s, start=start, peak=peak, warmup_steps=steps, form=form) for s in range(steps)]
    assert line[0] == start
    differences = [b - a for a, b in pairwise(line)]
    rises = steps if form == "open" else max(steps - 1, 1)
    assert differences == pytest.approx([(peak - start) / rises] * (steps - 1))
    if form == "closed" and steps > 1:
        assert line[-1] == pytest.approx(peak)


@given(lengths, lengths, st.integers(0, 10), values, values, values, forms, st.booleans())
def test_a_schedule_stays_within_its_values_and_ends_at_the_last(after, steps, frozen, start, peak, final, form, whole):
    total = frozen + steps + after
    shape = {"start": start, "peak": peak, "final": final, "warmup_form": form, "whole": whole}
    shape |= {"warmup_steps": steps, "frozen_steps": frozen, "total_steps": total}
    found = [warmup_cosine(s, **shape) for s in range(total + 3)]
    assert found[:frozen] == [0.0] * frozen
    low, high = min(start, peak, final), max(start, peak, final)
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in found[frozen:])
    assert found[total:] == [final] * 3


@given(lengths, lengths, values, values)
def test_freezing_shifts_a_schedule_of_the_remaining_steps(after, frozen, peak, final):
    shape = {"peak": peak, "final": final, "warmup_steps": 2}
    late = [warmup_cosine(s, **shape, frozen_steps=frozen, total_steps=frozen + after + 2) for s in range(frozen, 99)]
    assert late == [warmup_cosine(s, **shape, total_steps=after + 2) for s in range(99 - frozen)]


def test_a_whole_cosine_goes_on_below_the_peak_where_the_warmup_ends():
    shape = {"peak": 1.0, "final": 0.0, "warmup_steps": 5, "total_steps": 20}
    assert warmup_cosine(5, **shape, whole=True) == cosine(5, 1.0, 0.0, 20) < warmup_cosine(5, **shape) == 1.0


@given(st.lists(st.integers(1, 100), max_size=5, unique=True).map(sorted), st.floats(0.01, 1.0), values)
def test_steps_multiply_once_at_each_milestone(milestones, gamma, peak):
    for count, milestone in enumerate(milestones):
        at = [multistep(s, peak=peak, milestones=milestones, gamma=gamma) for s in (milestone - 1, milestone)]
        assert at[1] == pytest.approx(peak * gamma ** (count + 1))
        if milestone - 1 not in milestones:
            assert at[0] == pytest.approx(peak * gamma**count)


def test_poly_falls_from_the_peak_where_it_starts_to_its_end_by_its_power():
    shape = {"peak": 2.0, "final": 0.5, "start_step": 4, "total_steps": 12}
    assert poly(4, power=0.9, **shape) == 2.0
    assert poly(8, power=1.0, **shape) == pytest.approx(1.25)
    assert poly(8, power=2.0, **shape) == pytest.approx(0.5 + 1.5 * 0.25)
    assert poly(12, power=0.9, **shape) == poly(99, power=0.9, **shape) == 0.5


@given(steps=st.integers(2, 200), extra=st.floats(0, 2), start=st.floats(-2, 2), end=st.floats(-2, 2))
def test_a_closed_cosine_ends_in_its_last_step_and_moves_one_way(steps, extra, start, end):
    values = [closed_cosine(step, start, end, steps, extra=extra) for step in range(steps + 3)]
    assert values[0] == start and values[steps - 1 :] == [end] * 4
    assert values == pytest.approx(sorted(values, reverse=start > end))


def test_a_cut_cosine_is_steeper_at_its_end_than_a_whole_one():
    whole, cut = ([closed_cosine(step, 1.0, 0.0, 100, extra=extra) for step in range(100)] for extra in (0.0, 0.5))
    assert whole[98] - whole[99] < 0.1 * (cut[98] - cut[99])
    assert closed_cosine(0, 1.0, 0.0, 1) == 1.0


def test_of_a_longer_cosine_a_run_can_pass_a_share():
    given = {"peak": 1.0, "final": 0.1, "warmup_steps": 4}
    values = [warmup_cosine(step, total_steps=20, share=0.8, **given) for step in range(20)]
    assert values == [warmup_cosine(step, total_steps=24, **given) for step in range(20)] and values[-1] > 0.15


def test_a_cosine_can_end_before_the_run_and_hold_its_last_value():
    values = [
        warmup_cosine(step, peak=1.0, final=0.1, warmup_steps=3, total_steps=30, cosine_form="closed", cosine_steps=10)
        for step in range(30)
    ]
    assert values[3] == 1.0 and values[11] > 0.1 and values[12:] == [0.1] * 18
