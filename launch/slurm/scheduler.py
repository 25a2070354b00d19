"""The scheduler's commands: submit, query, cancel. Never sacct: many clusters have no accounting."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SECONDS = 60
_ENDED = (
    *("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL"),
    *("DEADLINE", "REVOKED", "UNKNOWN"),
)


class SchedulerError(RuntimeError):
    """SLURM refused or is not available; the message contains SLURM's text."""


@dataclass(frozen=True)
class JobState:
    """SLURM's record of a job. state: PENDING, RUNNING, COMPLETED, ...; UNKNOWN if SLURM has no record."""

    job: str
    state: str
    reason: str = ""
    nodes: str = ""
    restarts: int = 0

    @property
    def is_active(self) -> bool:
        return self.state not in _ENDED


def submit(script: Path, arguments: Sequence[str], *, options: Sequence[str] = ()) -> str:
    """Submit `script`; the job's id."""
    return _run(["sbatch", "--parsable", *options, str(script), *arguments]).strip().split(";")[0]


def would_start(script: Path, arguments: Sequence[str], *, options: Sequence[str] = ()) -> str:
    """The output of `sbatch --test-only`: when and where the job could start. Nothing is run."""
    return _run(["sbatch", "--test-only", *options, str(script), *arguments], with_errors=True).strip()


def cancel(job: str) -> None:
    _run(["scancel", job])


def log_of(job: str) -> Path | None:
    """The file of a job's standard output; None if SLURM has no record of the job."""
    found = re.search(r" StdOut=(.*?)(?: \w+=|\s*$)", _show(job))
    return Path(found[1].replace("%%", "%")) if found else None


def states(jobs: Sequence[str]) -> dict[str, JobState]:
    """The state of each job. Each is queried alone, which costs a busy controller less than its complete queue."""
    return {job: _state(job) for job in jobs}


def _state(job: str) -> JobState:
    facts = dict(re.findall(r"(\w+)=(\S+)", _show(job)))
    nodes, reason = facts.get("NodeList", ""), facts.get("Reason", "")
    return JobState(
        job=job,
        state=facts.get("JobState", "UNKNOWN"),
        reason="" if reason == "None" else reason,
        nodes="" if nodes == "(null)" else nodes,
        restarts=int(facts.get("Restarts", "0")),
    )


def _show(job: str) -> str:
    """SLURM's record of a job, in one line; "" if it has none.

    Raises:
        SchedulerError: it does not answer, so the state of the job is unknown.
    """
    try:
        return _run(["scontrol", "show", "job", "-o", job])
    except SchedulerError as error:
        if "Invalid job id" in str(error):
            return ""
        raise


def _run(command: Sequence[str], *, with_errors: bool = False) -> str:
    """Its standard output; SchedulerError with its message when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except FileNotFoundError:
        raise SchedulerError(f"{command[0]}: not found; this machine has no SLURM client") from None
    except subprocess.TimeoutExpired:
        raise SchedulerError(f"{command[0]}: no answer within {_SECONDS} s; is the controller up? (sinfo)") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise SchedulerError(f"{command[0]}: {said}")
    return done.stdout + (done.stderr if with_errors else "")
