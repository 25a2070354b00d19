"""Who is behind, from what the ranks told before they fell silent."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pretrain.engine.watchdog.hang import RankState, behind, innermost_frame, numbers, sentence

BASE = RankState(
    0, "n1", "agree", 8, 0, 57, "all_reduce", 612.0, 600.0, "S", "decide (pretrain/engine/optim/clip.py:80)"
)


def ranks(*changes: dict) -> list[RankState]:
    """A rank on every host n1, n1, n2, n2, ... with its changes."""
    return [replace(BASE, rank=rank, host=f"n{rank // 2 + 1}", **change) for rank, change in enumerate(changes)]


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        ({"phase": "data", "inside": "", "collectives": 56}, "it waits for its data of step 8"),
        ({"phase": "backward", "inside": "", "collectives": 56}, "it is in its backward pass of step 8"),
        ({"phase": "after", "step": 7, "inside": ""}, "it is between two steps"),
        ({"collectives": 56, "inside": ""}, "it waits for the other ranks"),
        ({"process": "T"}, "its process is stopped"),
        ({"process": "X"}, "its process has ended"),
        ({"frame": "decode (mine.py:3)"}, "at decode (mine.py:3)"),
        ({"process": "D"}, "it waits in the kernel"),
    ],
)
def test_the_rank_that_the_others_wait_for_is_named(odd: dict, reason: str):
    told, blamed = sentence(ranks({}, {}, odd, {}))
    assert [state.rank for state in blamed] == [2]
    assert "rank 2 on n2 is behind" in told and reason in told and "ranks 0-1, 3 in agree of step 8" in told


def test_an_earlier_micro_batch_is_behind_a_later_phase_of_the_same_step():
    found, _ = behind(ranks({"phase": "backward", "micro": 0}, {"phase": "data", "micro": 1}))
    assert [state.rank for state in found] == [0]


def test_all_ranks_of_a_host_are_named_together():
    told, _ = sentence(ranks({}, {}, {"phase": "save", "step": 7}, {"phase": "save", "step": 7}))
    assert "ranks 2-3 on n2 are behind: it saves a checkpoint of step 7" in told


def test_nobody_is_blamed_where_all_stand_at_the_same_place():
    told, blamed = sentence(ranks({}, {}))
    assert blamed == [] and "same place" in told and "ranks 0-1 in agree of step 8 (all_reduce 57)" in told


def test_a_host_that_does_not_answer_is_named():
    told, _ = sentence(ranks({}, {}), ["n2"])
    assert "n2 does not respond" in told


def test_numbers():
    assert numbers([7, 0, 2, 3, 4]) == "0, 2-4, 7"


def test_the_frame_is_that_of_the_main_thread():
    stacks = (
        'Thread 0x1 [pin] (most recent call first):\n  File "q.py", line 3 in get\n  File "t.py", line 9 in _run\n\n'
        'Current thread 0x2 (most recent call first):\n  File "mine.py", line 5 in decode\n'
        '  File "m.py", line 1 in <module>\n'
    )
    assert innermost_frame(stacks) == "decode (mine.py:5)"
    assert innermost_frame("no answer") == ""
