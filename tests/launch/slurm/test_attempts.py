"""What follows on an attempt of a job: decided by its history alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.slurm.attempts import MAX_FAILURES, Attempt, AttemptLog, Outcome, blame, decide, newest_step, outcome
from launch.slurm.jobs import jobs_of, submissions
from pretrain.engine.session.preempt import mark


def history(*attempts: tuple[Any, ...]) -> list[Attempt]:
    """(outcome, step[, node[, detail]]) in order."""
    return [Attempt("7", i, *attempt) for i, attempt in enumerate(attempts)]


@pytest.mark.parametrize(
    ("attempts", "action"),
    [
        ([("done", 100)], "done"),
        ([("stopped", 40)], "stop"),
        ([("ended", 40)], "stop"),
        ([("preempted", 0)] * 30, "requeue"),
        ([("time limit", 10), ("time limit", 20)], "requeue"),
        ([("time limit", 10), ("time limit", 10)], "stop"),
        ([("failed", 10)], "requeue"),
        ([("failed", 10), ("failed", 20)], "requeue"),
        ([("failed", 10), ("failed", 10)], "stop"),
        ([("failed", 10), ("preempted", 10), ("failed", 10)], "stop"),
        ([("failed", 10), ("preempted", 20), ("failed", 20)], "requeue"),
        ([("lost", 10), ("lost", 10)], "requeue"),
        ([("lost", 10), ("lost", 10), ("lost", 10)], "stop"),
        ([("failed", step) for step in range(MAX_FAILURES)], "stop"),
    ],
)
def test_a_job_is_requeued_while_it_makes_progress(attempts: list[tuple[Outcome, int]], action: str):
    assert decide(history(*attempts), spare=0).action == action


def test_a_node_that_fails_twice_is_excluded_while_one_is_to_spare():
    twice = history(("failed", 10, "n2"), ("failed", 20, "n2"))
    assert decide(twice, spare=1).exclude == ("n2",)
    assert decide(twice, spare=0).exclude == ()
    assert decide(history(("failed", 10, "n1"), ("failed", 20, "n2")), spare=9).exclude == ()


def test_ranks_killed_on_one_node_are_tried_on_another_and_exceptions_are_not():
    killed = history(("failed", 10, "n2", "n2 ranks 0: Killed"), ("failed", 10, "n2", "n2 ranks 0: Killed"))
    assert decide(killed, spare=1).action == "requeue"
    stopped = decide(killed, spare=0)
    assert stopped.action == "stop" and "n2 failed twice, but the partition has no other node" in stopped.why
    raised = history(*[("failed", 10, "n2", "n2 ranks 0: Exited with exit code 1")] * 2)
    assert decide(raised, spare=1).action == "stop"
    assert decide([*killed, *history(("failed", 10, "n3", "n3 ranks 1: Killed"))], spare=1).action == "stop"


def test_a_marker_of_an_earlier_attempt_is_no_success(tmp_path: Path):
    mark(tmp_path, "DONE")
    book = AttemptLog(tmp_path, job="7", restart=0)
    book.begin(nodes=["n1"], down=[])
    assert outcome(tmp_path, status=0, asked="", done_before=book.done_before()) == "failed"
    mark(tmp_path, "DONE")  # by this attempt
    assert outcome(tmp_path, status=0, asked="", done_before=book.done_before()) == "done"


@pytest.mark.parametrize(
    ("markers", "status", "asked", "expected"),
    [
        ({"DONE"}, 0, "", "done"),
        ({"DONE"}, 1, "", "failed"),
        ({"PREEMPTED"}, 85, "signal", "preempted"),
        ({"PREEMPTED"}, 85, "limit", "time limit"),
        ({"PREEMPTED"}, 85, "", "stopped"),
        ({"PREEMPTED"}, 85, "overdue", "failed"),
        (set(), 137, "signal", "failed"),
        ({"PREEMPTED"}, 143, "term", "ended"),
        ({"PREEMPTED"}, 85, "signal term", "preempted"),
        (set(), 143, "signal term", "ended"),
        ({"PREEMPTED"}, 85, "limit term", "ended"),
        (set(), 143, "overdue term", "ended"),
        (set(), 0, "", "failed"),
    ],
)
def test_the_markers_determine_how_the_ranks_ended(
    tmp_path: Path, markers: set[str], status: int, asked: str, expected: str
):
    for name in markers:
        (tmp_path / name).touch()
    assert outcome(tmp_path, status=status, asked=asked) == expected


def test_an_end_by_slurm_with_a_node_down_is_a_lost_node(tmp_path: Path):
    assert outcome(tmp_path, status=143, asked="term", lost={"n3"}) == "lost"


@pytest.mark.parametrize(
    ("ends", "node", "said"),
    [
        (["n2: task 0: Killed", "", "n3: task 1: Killed"], "n2", "ranks 0: Killed"),
        (["n1: task 0: Exited with exit code 1", "n2: task 1: Aborted"], "n2", "n1 ranks 0: Exited"),
        (["n1: tasks 0-3: Exited with exit code 1", "n2: task 4: Exited with exit code 1"], None, "n1 ranks 0-3"),
        (["n1: task 0: Exited with exit code 85", "n2: task 1: Terminated"], None, ""),
        ([], None, ""),
    ],
)
def test_the_node_is_blamed_that_failed_first_and_alone(ends: list[str], node: str | None, said: str):
    lines = [
        f"srun: error: {end}" if end else "srun: launch/slurm: _step_signal: Terminating StepId=8.0" for end in ends
    ]
    blamed, first = blame("\n".join(lines))
    assert blamed == node and said in first


def test_an_attempt_without_an_end_was_lost_with_the_node_that_is_down(tmp_path: Path):
    assert AttemptLog(tmp_path, job="7", restart=0).begin(nodes=["n1", "n2"], down=[]) == []
    (lost,) = AttemptLog(tmp_path, job="7", restart=1).begin(nodes=["n1", "n3"], down=["n2", "n9"])
    assert (lost.outcome, lost.node, lost.restart) == ("lost", "n2", 0)
    assert AttemptLog(tmp_path, job="8", restart=0).begin(nodes=["n1"], down=[]) == [], (
        "another job has its own history"
    )
    (tmp_path / "slurm" / "attempts.jsonl").open("a").write('{"event": "be')  # cut short by a full disk
    assert len(AttemptLog(tmp_path, job="7", restart=1).end("done", node=None, detail="")) == 2


def test_damaged_lines_of_records_are_named_and_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = AttemptLog(tmp_path, job="7", restart=0)
    log.begin(nodes=["n1"], down=[])
    with log.path.open("ab") as file:
        file.write(b'\xff\x00\n[7]\n{"job": "7"}\n')
    assert len(log.end("done", node=None, detail="")) == 1
    (tmp_path / "slurm" / "jobs.jsonl").write_text(
        '{"job": 7}\n{"job": "8", "program": "pretrain", "arguments": [], "time": ""}'
    )
    assert [submitted.job for submitted in submissions(tmp_path)] == ["8"] and jobs_of(tmp_path) == ["7", "8"]
    said = capsys.readouterr().err
    assert "attempts.jsonl: line 2 is damaged and is not used" in said and "jobs.jsonl: line 1 is damaged" in said


def test_progress_is_the_newest_sealed_checkpoint(tmp_path: Path):
    for step, files in ((10, ["MANIFEST.json"]), (20, [])):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        for name in files:
            (folder / name).write_text(json.dumps({}))
    assert newest_step(tmp_path) == 10 and newest_step(tmp_path / "nothing") == 0
