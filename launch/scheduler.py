"""The scheduler's commands: submit, ask, end. Never sacct: many clusters keep no accounts."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SECONDS = 60


class SchedulerError(RuntimeError):
    """SLURM refused, or is not there; the message has its own words."""


@dataclass(frozen=True)
class JobState:
    """What SLURM knows of a job. state: PENDING, RUNNING, COMPLETED, ...; UNKNOWN once SLURM has forgotten it."""

    job: str
    state: str
    reason: str = ""
    nodes: str = ""
    restarts: int = 0
    start: str = ""
    end: str = ""

    @property
    def is_active(self) -> bool:
        return self.state.split("+")[0] in ("PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED")


def submit(script: Path, arguments: Sequence[str], *, options: Sequence[str] = ()) -> str:
    """Submit `script`; the job's id."""
    return _run(["sbatch", "--parsable", *options, str(script), *arguments]).strip().split(";")[0]


def would_start(script: Path, arguments: Sequence[str], *, options: Sequence[str] = ()) -> str:
    """What SLURM says to `sbatch --test-only`: when and where the job could start. It does not run anything."""
    return _run(["sbatch", "--test-only", *options, str(script), *arguments], with_errors=True).strip()


def cancel(job: str) -> None:
    _run(["scancel", job])


def log_of(job: str) -> Path | None:
    """The file of a job's standard output; None once SLURM has forgotten the job."""
    try:
        found = re.search(r"StdOut=(\S+)", _run(["scontrol", "show", "job", "-o", job]))
    except SchedulerError:
        return None
    return Path(found[1]) if found else None


def states(jobs: Sequence[str]) -> dict[str, JobState]:
    """The state of each job: of squeue what it lists, of scontrol what ended not long ago."""
    listed = {row.job: row for row in _queue()} if jobs else {}
    return {job: listed.get(job) or _shown(job) for job in jobs}


def _queue() -> list[JobState]:
    try:
        rows = json.loads(_run(["squeue", "--json", "--all"]))["jobs"]
    except (SchedulerError, ValueError, KeyError):
        return []  # older than 21.08, or built without JSON: scontrol knows as much of one job
    return [_queued(row) for row in rows]


def _queued(row: dict) -> JobState:
    state = row["job_state"]
    return JobState(
        job=str(row["job_id"]),
        state=state if isinstance(state, str) else "+".join(state),  # a list since 23.11
        reason=str(row.get("state_reason") or ""),
        nodes=str(row.get("nodes") or ""),
        restarts=_count(row.get("restart_cnt")),
    )


def _count(value: object) -> int:
    """A number, or since 23.02 {"set": ..., "number": ...}."""
    found = value.get("number", 0) if isinstance(value, dict) else value
    return found if isinstance(found, int) else 0


def _shown(job: str) -> JobState:
    try:
        text = _run(["scontrol", "show", "job", "-o", job])
    except SchedulerError:
        return JobState(job, "UNKNOWN")
    facts = dict(re.findall(r"(\w+)=(\S+)", text))
    nodes = facts.get("NodeList", "")
    return JobState(
        job=job,
        state=facts.get("JobState", "UNKNOWN"),
        reason=facts.get("Reason", "").replace("None", ""),
        nodes="" if nodes == "(null)" else nodes,
        restarts=int(facts.get("Restarts", "0")),
        start=facts.get("StartTime", ""),
        end=facts.get("EndTime", ""),
    )


def _run(command: Sequence[str], *, with_errors: bool = False) -> str:
    """Its standard output; SchedulerError with what it said when it fails."""
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
