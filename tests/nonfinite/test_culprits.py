"""Which rows of a batch break it: found by halving, and only when it is they."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pretrain.core import heartbeat
from pretrain.nonfinite.culprits import MOST_CULPRITS, evaluate, find_culprits, rows_of
from tests.objectives.tiny import batch, objective


@given(st.integers(1, 64), st.data())
def test_rows_that_break_a_batch_by_themselves_are_found(count: int, data: st.DataObject):
    most = min(MOST_CULPRITS, max(1, count // 2))
    bad = data.draw(st.sets(st.integers(0, count - 1), max_size=most))
    asked: list[int] = []

    def is_broken(rows) -> bool:
        assert len(rows) == count
        asked.append(1)
        return any(row in bad for row in rows)

    assert find_culprits(is_broken, count) == (sorted(bad) or None)
    assert len(asked) <= 2 + 2 * max(1, len(bad)) * (count.bit_length() + 1)


def test_a_meeting_of_rows_or_most_of_them_is_nobodys_fault():
    assert find_culprits(lambda rows: 2 in rows and 5 in rows, 8) is None
    assert find_culprits(lambda rows: True, 8) is None
    # Row 1 breaks any batch alone; but without it the batch is broken still.
    assert find_culprits(lambda rows: 1 in rows or len(set(rows)) > 4, 8) is None


def test_the_search_is_no_hang_to_the_watchdog():
    """It may take longer than a step; each part of the batch that was computed is a sign of life."""
    of = objective("mae").train()
    heart = heartbeat.begin()
    try:
        beats = heart._beats
        evaluate(of, batch(of), 0, seed=1, precision="fp32")
        assert heart._beats > beats
    finally:
        heartbeat.end()


@pytest.mark.parametrize("name", ["mae", "dino"])
def test_computing_a_batch_again_leaves_no_trace(name: str):
    of = objective(name).train()
    before = {key: value.clone() for key, value in of.state_dict().items()}
    whole = batch(of, images=4)
    first = evaluate(of, whole, 0, seed=3, precision="fp32")
    second = evaluate(of, whole, 0, seed=3, precision="fp32")
    assert first == second and not first.broken
    assert all(torch.equal(value, before[key]) for key, value in of.state_dict().items())
    assert all(param.grad is None for param in of.parameters())


def test_a_gradient_that_is_not_finite_is_named_where_the_loss_is():
    of = objective("mae").train()
    of.get_parameter("decoder.norm.weight").register_hook(lambda gradient: gradient * float("inf"))
    outcome = evaluate(of, batch(of), 0, seed=0, precision="fp32")
    assert outcome.broken and not outcome.bad_losses
    assert outcome.bad_gradients == ("decoder.norm.weight",)


def test_a_broken_sample_of_a_real_objective_is_found():
    of = objective("mae").train()
    whole = batch(of, images=6)
    whole["image"][4, 0, 0, 3, 3] = float("inf")

    def is_broken(rows) -> bool:
        return evaluate(of, rows_of(whole, rows), 0, seed=0, precision="fp32").broken

    assert find_culprits(is_broken, 6) == [4]


def test_rows_of_a_batch_are_taken_from_every_entry():
    whole: dict[str, Tensor] = {"a": torch.arange(4), "b": torch.arange(8).view(4, 2)}
    assert {k: v.tolist() for k, v in rows_of(whole, [3, 0, 3]).items()} == {
        "a": [3, 0, 3],
        "b": [[6, 7], [0, 1], [6, 7]],
    }
