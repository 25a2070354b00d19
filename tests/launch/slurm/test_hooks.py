"""The lines printed for a batch script before and after its ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from launch.slurm.attempts import AttemptLog, cancel_mark
from launch.slurm.hooks import main
from pretrain.engine.watchdog.faults import add_fault
from tests.runs import write_config

Ask = Callable[..., str]
PLACES = ["--nodes=n1,n2", "--partition-nodes=n1,n2,n3"]


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """The line printed by one of the two hooks for attempt 1 of job 7, and the text in the job's log."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    config, run = write_config(tmp_path, "mae"), tmp_path / "run"
    run.mkdir()

    def ask(moment: str, *flags: str) -> str:
        what = ["pretrain", str(config)] if moment == "begin" else [str(run)]
        assert main([moment, *PLACES, *flags, *what]) == 0
        said = capsys.readouterr()
        return f"{said.out.strip()} | {said.err.strip()}"

    return ask


def lose(run: Path, *, times: int) -> None:
    """Attempts that lost n2 with their batch script; the last is still without an end."""
    for restart in range(times):
        AttemptLog(run, job="7", restart=restart).begin(nodes=["n1", "n2"], down=["n2"])


def test_an_attempt_begins_without_the_requests_of_the_previous_one(tmp_path: Path, ask: Ask):
    for name in ("stop", "PREEMPTED"):
        (tmp_path / "run" / name).touch()
    assert ask("begin").startswith(f"go {tmp_path}/run | ")
    assert not any((tmp_path / "run" / name).exists() for name in ("stop", "PREEMPTED"))


def test_a_job_that_gets_a_node_again_which_it_lost_twice_requests_another(tmp_path: Path, ask: Ask):
    lose(tmp_path / "run", times=2)
    assert ask("begin", "--down=n2", "--excluded=n9").startswith(
        "requeue n2,n9 | fovea launch: requeue: lost at step 0"
    )


@pytest.mark.parametrize("flags", [["--down=n2,n3"], ["--down=n2", "--excluded=n3"], ["--down=n2", "--nodes=n1,n3"]])
def test_it_continues_if_no_other_node_exists_and_without_that_node(tmp_path: Path, ask: Ask, flags: list[str]):
    lose(tmp_path / "run", times=2)
    assert ask("begin", *flags).startswith("go ")


def test_slurm_s_end_of_a_job_with_a_node_down_is_that_node_s(tmp_path: Path, ask: Ask):
    said = ask("end", "--status=143", "--asked=term", "--down=n2,n8")
    assert said.startswith("requeue | fovea launch: requeue: lost at step 0 (down: n2)")
    assert '"node": "n2"' in (tmp_path / "run" / "slurm" / "attempts.jsonl").read_text()


def test_a_job_that_loses_nodes_and_gets_nowhere_stops(tmp_path: Path, ask: Ask):
    lose(tmp_path / "run", times=3)
    assert ask("begin").startswith("stop | fovea launch: stop: 3 attempts ended at step 0")


@pytest.mark.parametrize("moment", [("begin",), ("end", "--status=1")])
def test_a_cancelled_job_stops_and_another_one_of_the_run_continues(
    tmp_path: Path, ask: Ask, moment: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "run" / "slurm").mkdir()
    cancel_mark(tmp_path / "run", "7").touch()
    assert ask(*moment).startswith("stop | fovea launch: stop: cancelled by `fovea launch slurm cancel`")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert not ask(*moment).startswith("stop")


def test_a_hang_is_the_node_s_that_the_run_names_not_the_first_that_srun_saw(tmp_path: Path, ask: Ask):
    run, log = tmp_path / "run", tmp_path / "srun.log"
    log.write_text("srun: error: n1: task 0: Exited with exit code 50\n")
    add_fault(run, "hang", "hang: rank 1 on n2 is behind", hosts=["n2"], ranks=[1])
    assert "failed at step 0 (hang: rank 1 on n2 is behind)" in ask("end", "--status=50", f"--srun-log={log}")
    assert '"node": "n2"' in (run / "slurm" / "attempts.jsonl").read_text()


def test_ranks_that_did_not_stop_in_time_blame_no_node(tmp_path: Path, ask: Ask):
    log = tmp_path / "srun.log"
    log.write_text("srun: error: n1: task 0: Killed\n")
    (tmp_path / "run" / "PREEMPTED").touch()
    assert "failed at step 0 (did not stop in time)" in ask(
        "end", "--status=137", "--asked=overdue", f"--srun-log={log}"
    )
    assert '"node": null' in (tmp_path / "run" / "slurm" / "attempts.jsonl").read_text()
