"""The state of a run's jobs when SLURM does not answer, has no record of them, or reports paths with spaces."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.slurm import scheduler
from launch.slurm.attempts import add_row, cancel_mark
from launch.slurm.jobs import cancel, find_run, follow, status, submit
from launch.slurm.scheduler import SchedulerError
from tests.runs import ROOT

JOB = "JobId=7 JobName=fovea JobState={} Reason=None Restarts=2 NodeList=n[1-2] StdOut={} Power="
AWAY = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
FORGOTTEN = "slurm_load_jobs error: Invalid job id specified"


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let scontrol print one text after another, the last one forever; for an unknown job, an error."""
    answers = tmp_path / "answers"
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(
        f"#!/bin/bash\nread -r said <{answers}\n"
        f"(($(wc -l <{answers}) == 1)) || sed -i 1d {answers}\n"
        '[[ $said == JobId* ]] || { echo "$said" >&2; exit 1; }\necho "$said"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    def say(*texts: str) -> None:
        answers.write_text("".join(f"{text}\n" for text in texts))

    return say


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Of a run whose job is 7."""
    folder = tmp_path / "a run"
    add_row(folder / "slurm" / "jobs.jsonl", {"job": "7", "program": "pretrain", "arguments": ["x.yaml"], "time": ""})
    return folder


def test_a_controller_that_is_away_is_no_free_run_folder(run_dir: Path, says: Callable[..., None]):
    says(AWAY)
    for ask in (lambda: submit(run_dir, "pretrain", ["x.yaml"], "#!/bin/bash\n"), lambda: cancel(run_dir, now=True)):
        with pytest.raises(SchedulerError, match="Unable to contact"):
            ask()
    assert "job   7 UNKNOWN (scontrol: slurm_load_jobs error: Unable to contact" in status(run_dir)


def test_a_job_without_a_record_in_slurm_is_over(run_dir: Path, says: Callable[..., None]):
    says(FORGOTTEN)
    assert not scheduler.states(["7"])["7"].is_active
    with pytest.raises(ValueError, match="no job of this run is waiting or running"):
        cancel(run_dir, now=False)
    with pytest.raises(ValueError, match="or unknown to SLURM; give the run folder"):
        find_run("7")


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "REQUEUE_HOLD", "SPECIAL_EXIT"])
def test_a_job_that_may_continue_owns_the_run(run_dir: Path, says: Callable[..., None], state: str):
    says(JOB.format(state, "/x"))
    with pytest.raises(ValueError, match=f"job 7 is {state} for this run; cancel it first"):
        submit(run_dir, "pretrain", ["x.yaml"], "#!/bin/bash\n")


def test_a_run_is_found_by_its_job_s_number_in_any_folder(run_dir: Path, says: Callable[..., None]):
    says(JOB.format("RUNNING", run_dir / "slurm" / "job-7.log"))
    assert find_run("7") == run_dir


def test_a_log_is_followed_although_slurm_does_not_answer_once(run_dir: Path, says: Callable[..., None]):
    says(JOB.format("RUNNING", "/x"), AWAY, JOB.format("COMPLETED", "/x"))
    (run_dir / "slurm" / "job-7.log").write_text("begins\n")
    heard: list[str] = []
    follow(run_dir, rank=0, keep_on=True, lines=20, write=heard.append, poll_seconds=0.01)
    assert heard == ["==> slurm/job-7.log\nbegins\n"]
    assert scheduler.states(["7"])["7"].state == "COMPLETED", "it went on until the job was over"


def test_an_attempt_of_a_finished_job_is_not_running(run_dir: Path, says: Callable[..., None]):
    row = {"event": "begin", "job": "7", "restart": 0, "time": "t", "step": 3, "nodes": ["n1"]}
    add_row(run_dir / "slurm" / "attempts.jsonl", row)
    says(JOB.format("CANCELLED", "/x"))
    assert "from step 3 on n1; no record of its end" in status(run_dir)
    says(JOB.format("RUNNING", "/x"))
    assert "from step 3 on n1; running" in status(run_dir)


@pytest.mark.processes
def test_a_reader_that_has_read_enough_is_no_error(run_dir: Path, says: Callable[..., None]):
    says(JOB.format("RUNNING", "/x"))
    command = [sys.executable, "-u", "-m", "fovea", "launch", "slurm", "status", str(run_dir)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("state", "now", "asked"), [("RUNNING", False, True), ("RUNNING", True, False), ("PENDING", False, False)]
)
def test_cancel_requests_a_running_job_to_stop_and_ends_any_other_without_a_restart(
    run_dir: Path, tmp_path: Path, says: Callable[..., None], state: str, now: bool, asked: bool
):
    says(JOB.format(state, "/x"))
    scancel = tmp_path / "bin" / "scancel"
    scancel.write_text(f"#!/bin/bash\necho $* >{tmp_path}/ended\n")
    scancel.chmod(0o755)
    cancel(run_dir, now=now)
    assert (run_dir / "stop").exists() == asked and (tmp_path / "ended").exists() != asked
    assert cancel_mark(run_dir, "7").exists()


def test_of_a_rank_its_own_log_is_shown_and_not_its_preflight_s(run_dir: Path):
    attempt = run_dir / "slurm" / "7.0"
    attempt.mkdir()
    for name in ("rank-0", "rank-10", "preflight-0"):
        (attempt / f"{name}.log").write_text(f"{name}\n")
    heard: list[str] = []
    follow(run_dir, rank=0, keep_on=False, lines=20, write=heard.append)
    assert heard == ["==> slurm/7.0/rank-0.log\nrank-0\n"]
