"""The batch script alone, with replacements for SLURM's commands: its behaviour when they fail or print little."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from launch.slurm.attempts import read_json_lines
from launch.slurm.template import read_template, render
from tests.runs import LONG, ROOT, wait_until, write_config

pytestmark = pytest.mark.processes

# Each counts its calls in a file of its name; AWAY calls of `scontrol show job` and of `scontrol requeue` fail.
SCONTROL = """
[[ $2 != hostnames ]] || { echo n1; exit; }
echo "$*" >>"$SAID/scontrol"
(($(grep -c "^$1 ${2%%[0-9]*}" "$SAID/scontrol") > AWAY)) || { echo "Unable to contact slurm controller" >&2; exit 1; }
[[ $1 == show ]] || exit 0
echo "JobId=7 JobName=fovea Restarts=0 EndTime=$END PreemptTime=$PREEMPT ReqNodeList=(null) ExcNodeList=n9 StdOut=/x"
"""
# The ranks: they save on request; "deaf" ones end only with SLURM's end of the step, "told" ones stop by themselves.
SRUN = """
trap 'exit 143' TERM
until [[ -e $RUN/stop && $RANKS != deaf ]]; do
    echo "$SRUN_CPUS_PER_TASK,$SLURM_EXPORT_ENV, $*" >"$SAID/srun"
    [[ $RANKS != told ]] || break
    /bin/sleep 0.1
done
touch "$RUN/PREEMPTED"
exit 85
"""
SINFO = "[[ $* == *down* ]] || echo n1"
COMMANDS = {"scontrol": SCONTROL, "srun": SRUN, "sinfo": SINFO, "sleep": "exec /bin/sleep 0.1"}


@dataclass
class Job:
    """One attempt of job 7 on the node n1, eight ranks of three cores, under `sbatch --export=NONE`."""

    folder: Path
    away: int = 0
    end: str = "2099-01-01T00:00:00"
    preempted_at: str = "None"
    ranks: str = "hear"
    launcher: str = "srun"
    process: subprocess.Popen[str] = field(init=False)

    def start(self) -> Job:
        config, programs = write_config(self.folder, "mae"), self.folder / "bin"
        programs.mkdir()
        for name, text in COMMANDS.items():
            (programs / name).write_text(f"#!/bin/bash\n{text.lstrip()}")
            (programs / name).chmod(0o755)
        settings = {"PYTHON": [sys.executable], "PREFLIGHT": "no", "LAUNCHER": self.launcher}
        script = self.folder / "job.sbatch"
        script.write_text(render(read_template("pretrain"), options={}, settings=settings))
        slurm = {"JOB_ID": "7", "JOB_NODELIST": "n1", "JOB_PARTITION": "p", "NTASKS": "8", "NTASKS_PER_NODE": "8"}
        slurm |= {"JOB_NUM_NODES": "1", "CPUS_PER_TASK": "3", "EXPORT_ENV": "NONE"}
        env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        env |= {f"SLURM_{name}": value for name, value in slurm.items()} | {"SLURMD_NODENAME": "n1"}
        env |= {"AWAY": str(self.away), "END": self.end, "PREEMPT": self.preempted_at, "RANKS": self.ranks}
        env |= {"RUN": str(self.run), "SAID": str(self.folder), "PATH": f"{programs}:{env['PATH']}"}
        self.process = subprocess.Popen(
            ["bash", str(script), str(config), "optim.total_steps=24"],
            cwd=ROOT,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return self

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def wait_for_ranks(self) -> None:
        wait_until(lambda: (self.folder / "srun").exists(), self.process)

    def finish(self) -> tuple[int, str]:
        """Its exit status, how the attempt ended."""
        try:
            said, _ = self.process.communicate(timeout=LONG)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
        rows = read_json_lines(self.run / "slurm" / "attempts.jsonl")
        ends = [row["outcome"] for row in rows if row["event"] == "end"]
        assert len(ends) == 1, said
        return self.process.returncode, ends[0]

    @property
    def requeues(self) -> int:
        said = (self.folder / "scontrol").read_text().splitlines()
        return sum(line.startswith("requeue") for line in said)


def test_a_controller_that_is_away_for_a_moment_costs_neither_the_attempt_nor_the_requeue(tmp_path: Path):
    job = Job(tmp_path, away=2).start()
    job.wait_for_ranks()
    job.process.send_signal(signal.SIGUSR1)
    assert job.finish() == (0, "preempted")
    assert job.requeues == 3


def test_a_job_whose_time_limit_is_not_known_is_not_ended_by_the_clock(tmp_path: Path):
    job = Job(tmp_path, away=6, ranks="deaf").start()
    job.wait_for_ranks()
    time.sleep(1.5)
    assert job.process.poll() is None and not (job.run / "stop").exists()
    os.killpg(job.process.pid, signal.SIGTERM)
    assert job.finish()[1] == "ended"


def test_slurm_s_end_after_its_warning_is_no_failure_of_a_run_that_could_not_save(tmp_path: Path):
    job = Job(tmp_path, ranks="deaf").start()
    job.wait_for_ranks()
    job.process.send_signal(signal.SIGUSR1)
    wait_until(lambda: (job.run / "stop").exists(), job.process)
    os.killpg(job.process.pid, signal.SIGTERM)
    status, how = job.finish()
    assert status != 0 and how == "ended" and job.requeues == 0, "SLURM starts it again, or does not"


@pytest.mark.parametrize(("preempted_at", "how"), [("2026-01-01T00:00:00", "preempted"), ("None", "stopped")])
def test_ranks_stopped_by_slurm_alone_were_preempted_if_slurm_reports_it(tmp_path: Path, preempted_at: str, how: str):
    job = Job(tmp_path, ranks="told", preempted_at=preempted_at).start()
    assert job.finish()[1] == how
    assert job.requeues == (how == "preempted")


def test_slurm_s_warning_of_a_limit_shorter_than_the_margin_is_no_preemption(tmp_path: Path):
    soon = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 240))
    job = Job(tmp_path, end=soon).start()
    job.wait_for_ranks()
    time.sleep(1.5)
    assert not (job.run / "stop").exists(), "a quarter of the limit is the margin"
    job.process.send_signal(signal.SIGUSR1)
    assert job.finish() == (0, "time limit"), "which counts when nothing was reached"


@pytest.mark.parametrize(("launcher", "given"), [("srun", ""), ("torchrun", "--cpus-per-task=24")])
def test_ranks_have_the_cores_and_the_variables_of_their_job(tmp_path: Path, launcher: str, given: str):
    job = Job(tmp_path, ranks="told", launcher=launcher).start()
    assert job.finish()[1] == "stopped"
    cores, exported, flags = (tmp_path / "srun").read_text().split(",", 2)
    assert cores == "3" and exported == "" and given in flags
    assert ("--cpus-per-task" in flags) == bool(given)
