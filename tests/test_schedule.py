from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.schedule import cosine, teacher_temp, warmup_cosine


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
