"""The cluster of the tests, and the runs on it whose trainer is a few lines of Python."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launch.slurm import scheduler
from launch.slurm.attempts import newest_step, read_json_lines
from launch.slurm.command import main
from tests.runs import LONG, ROOT, write_config

PYTHON = str(Path(__file__).parent / "python.sh")
SMALL = ["--cpus-per-task", "1", "--no-preflight", "--python", PYTHON, "--margin", "25"]


@dataclass
class Cluster:
    """Nodes n1 to n4 of 8 CPUs and 2 GPUs that are not; partitions low and, preempting it, high."""

    path: Path

    def script(self, *words: str) -> str:
        """Run cluster.sh: crash NODE, boot NODE, ..."""
        # Its daemons keep what they inherit open: no pipe to wait for.
        done = subprocess.run(["bash", str(self.path), *words], stdout=subprocess.DEVNULL, timeout=LONG)
        assert done.returncode == 0, f"cluster.sh {' '.join(words)}: status {done.returncode}"
        return ""

    @contextmanager
    def without(self, key: str) -> Iterator[None]:
        """Inside, slurm.conf lacks this key."""
        path = Path(os.environ["SLURM_CONF"])
        before = path.read_text()
        path.write_text(re.sub(rf"^{key}=", f"#{key}=", before, flags=re.MULTILINE))
        run(["scontrol", "reconfigure"])
        try:
            yield
        finally:
            path.write_text(before)
            run(["scontrol", "reconfigure"])

    def state(self, job: str) -> str:
        return scheduler.states([job])[job].state

    def wait(self, job: str, *states: str, seconds: float = LONG) -> None:
        """Wait until the job is in one of `states`."""
        wait_until(lambda: self.state(job) in states, f"job {job} in {states}", seconds)


class FakeRun:
    """A run folder with the configuration of a real run and, on the cluster, the trainer of the tests."""

    def __init__(self, folder: Path, *, steps: int = 60, step_seconds: float = 0.1, name: str = "run"):
        self.config = write_config(folder, "mae", name=name)
        self.run_dir, self.steps = folder / name, steps
        self.overrides = [f"optim.total_steps={steps}", "optim.warmup_steps=0"]
        self.faults = {"FAKE_STEP_SECONDS": str(step_seconds)}  # read by trainer.py

    def flags(self, *, nodes: int, minutes: str) -> list[str]:
        """Of a job on `nodes` nodes, one rank each, with the planted faults."""
        faults = [flag for name, value in self.faults.items() for flag in ("--environment", f"export {name}={value}")]
        return ["--nodes", str(nodes), "--gpus-per-node", "1", "--time", minutes, *SMALL, *faults]

    def submit(self, *flags: str, nodes: int = 2, minutes: str = "5") -> str:
        """Submit it; the job's id."""
        given = [*self.flags(nodes=nodes, minutes=minutes), *flags]
        assert main(["pretrain", str(self.config), *self.overrides, *given]) == 0
        return self.job

    @property
    def job(self) -> str:
        return read_json_lines(self.run_dir / "slurm" / "jobs.jsonl")[-1]["job"]

    @property
    def step(self) -> int:
        log = self.run_dir / "metrics.jsonl"
        return log.read_text().count("\n") if log.exists() else 0

    @property
    def outcomes(self) -> list[str]:
        return [row["outcome"] for row in self.rows("end")]

    @property
    def log(self) -> str:
        return (self.run_dir / "slurm" / f"job-{self.job}.log").read_text()

    def rows(self, event: str) -> list[dict]:
        return [row for row in read_json_lines(self.run_dir / "slurm" / "attempts.jsonl") if row["event"] == event]

    def assert_weights_as_undisturbed(self) -> None:
        weights = ""
        for step in range(1, self.steps + 1):
            weights = hashlib.sha256(f"{weights} {step}".encode()).hexdigest()
        assert newest_step(self.run_dir) == self.steps
        folder = self.run_dir / "checkpoints" / f"step-{self.steps:08d}"
        assert (folder / "weights").read_text() == weights


def wait_until(condition: Callable[[], bool], what: str, seconds: float = LONG) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.2)


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LONG)
