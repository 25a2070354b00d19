"""The SLURM jobs of a run: submit, show, follow, cancel, resume. They are recorded in `RUN/slurm/`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from launch.slurm import scheduler
from launch.slurm.attempts import ATTEMPT_KEYS, add_row, cancel_mark, newest_step, read_json_lines
from launch.slurm.scheduler import JobState, SchedulerError
from pretrain.core.record import parse_row


@dataclass(frozen=True)
class Submitted:
    """One line of `RUN/slurm/jobs.jsonl`. script: the submitted file, kept next to it as JOB.sbatch."""

    job: str
    program: str
    arguments: list[str]
    time: str


def submit(
    run_dir: Path, program: str, arguments: Sequence[str], script: str, *, options: Sequence[str] = ()
) -> Submitted:
    """Submit the text `script` as a job of this run.

    Raises:
        ValueError: the run has a job already. SchedulerError: SLURM refuses it.
    """
    busy = [state for state in scheduler.states(jobs_of(run_dir)).values() if state.is_active]
    if busy:
        raise ValueError(
            f"{run_dir}: job {busy[0].job} is {busy[0].state} for this run; "
            f"cancel it first: fovea launch slurm cancel {run_dir}"
        )
    folder = run_dir / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / ".new.sbatch"
    draft.write_text(script, encoding="utf-8")
    job = scheduler.submit(draft, arguments, options=options)
    draft.rename(folder / f"{job}.sbatch")
    submitted = Submitted(job, program, list(arguments), time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    add_row(folder / "jobs.jsonl", asdict(submitted))
    return submitted


def submissions(run_dir: Path) -> list[Submitted]:
    """The submissions by `fovea launch slurm`, in order."""
    keys = [field.name for field in fields(Submitted)]
    rows = read_json_lines(run_dir / "slurm" / "jobs.jsonl", keys)
    return [Submitted(**{key: row[key] for key in keys}) for row in rows if str(row["job"]).isdigit()]


def jobs_of(run_dir: Path) -> list[str]:
    """Ids of the run's jobs, in order; those submitted by hand are known after they began."""
    began = [row["job"] for row in _attempts(run_dir)]
    return sorted({*began, *(submitted.job for submitted in submissions(run_dir))}, key=int)


def find_run(where: str) -> Path:
    """The run folder of a path or of a job id.

    Raises:
        ValueError: neither has a SLURM job.
    """
    if where.isdigit():
        log = scheduler.log_of(where)
        if log is None or log.parent.name != "slurm":
            raise ValueError(
                f"job {where}: not a job of `fovea launch slurm`, or unknown to SLURM; give the run folder"
            )
        return log.parent.parent
    run_dir = Path(where).absolute()
    if not (run_dir / "slurm").is_dir():
        raise ValueError(f"{where}: no run folder with SLURM jobs (there is no {run_dir / 'slurm'})")
    return run_dir


def status(run_dir: Path) -> str:
    """The run's jobs, steps and attempts, as text."""
    lines = [f"run   {run_dir}"]
    marks = [name for name in ("DONE", "PREEMPTED") if (run_dir / name).exists()]
    row = _last_row(run_dir / "metrics.jsonl")
    loss = f", loss {row['loss']:.4g}" if "loss" in row else ""
    lines.append(f"step  {int(row.get('step', 0))}{loss}; newest checkpoint {newest_step(run_dir)} {' '.join(marks)}")
    try:
        states = scheduler.states(jobs_of(run_dir))
    except SchedulerError as error:
        states = {job: JobState(job, "UNKNOWN", f"{error}") for job in jobs_of(run_dir)}
    attempts = _attempts(run_dir)
    for job, state in states.items():
        where = f" on {state.nodes}" if state.nodes else ""
        reason = f" ({state.reason})" if state.reason not in ("", "None") else ""
        lines.append(f"job   {job} {state.state}{where}{reason}, restarts {state.restarts}")
        begun = {row["restart"]: row for row in attempts if row["job"] == job and row["event"] == "begin"}
        ended = {row["restart"]: row for row in attempts if row["job"] == job and row["event"] == "end"}
        for restart, begin in begun.items():
            end = ended.get(restart)
            how = "running" if state.is_active and restart == max(begun) else "no record of its end"
            how = f"{end['time']} {end['outcome']} at step {end['step']} {end['detail']}" if end else how
            nodes = ",".join(begin.get("nodes", ()))
            lines.append(f"  {restart}   {begin['time']} from step {begin['step']} on {nodes}; {how}".rstrip())
    return "\n".join(lines)


def cancel(run_dir: Path, *, now: bool) -> str:
    """Request the running job to save and stop; cancel a waiting one, and with `now` any. Returns a description.

    Raises:
        ValueError: the run has no active job.
    """
    active = [state for state in scheduler.states(jobs_of(run_dir)).values() if state.is_active]
    if not active:
        raise ValueError(f"{run_dir}: no job of this run is waiting or running")
    said = []
    for state in active:
        cancel_mark(run_dir, state.job).touch()  # a requeued attempt then ends at its start
        if now or state.state != "RUNNING":
            scheduler.cancel(state.job)
            said.append(f"job {state.job} cancelled")
        else:
            (run_dir / "stop").touch()
            said.append(f"job {state.job} was requested to save and stop; `cancel --now` does not wait for it")
    return "\n".join(said)


def follow(
    run_dir: Path, *, rank: int, keep_on: bool, lines: int, write: Callable[[str], object], poll_seconds: float = 1.0
) -> None:
    """Write the last `lines` of the newest job's log and of that rank's; with `keep_on` new lines, until the job ends.

    A new attempt has new files; they are followed as they appear.
    """
    seen: dict[Path, int] = {}
    for path in _logs(run_dir, rank):
        data = path.read_bytes()
        kept = data.decode(errors="replace").splitlines(keepends=True)[-lines:] if lines else []
        write(f"==> {path.relative_to(run_dir)}\n" + "".join(kept))
        seen[path] = len(data)
    active, next_look = True, 0.0
    while keep_on:
        if time.monotonic() >= next_look:
            # A controller that does not answer does not mean that the job has ended.
            with suppress(SchedulerError):
                active = any(state.is_active for state in scheduler.states(jobs_of(run_dir)[-1:]).values())
            next_look = time.monotonic() + 5 * poll_seconds
        for path in _logs(run_dir, rank):
            with path.open("rb") as file:
                file.seek(seen.get(path, 0))
                new = file.read()
            seen[path] = seen.get(path, 0) + len(new)
            if new:
                write(new.decode(errors="replace"))
        if not active:
            return
        time.sleep(poll_seconds)


def _attempts(run_dir: Path) -> list[dict[str, Any]]:
    rows = read_json_lines(run_dir / "slurm" / "attempts.jsonl", ATTEMPT_KEYS)
    return [row for row in rows if str(row["job"]).isdigit()]


def _logs(run_dir: Path, rank: int) -> list[Path]:
    """The newest job's own log, and the rank's of its newest attempt; under torchrun, that of this node."""
    folder, jobs = run_dir / "slurm", jobs_of(run_dir)
    if not jobs:
        return []
    attempts = sorted(folder.glob(f"{jobs[-1]}.[0-9]*"), key=lambda path: int(path.suffix[1:]))
    ranks = [attempts[-1] / f"{kind}-{rank}.log" for kind in ("rank", "node")] if attempts else []
    wanted = [folder / f"job-{jobs[-1]}.log", *ranks]
    return [path for path in wanted if path.exists()]


def _last_row(path: Path) -> dict[str, float]:
    """The last complete line of a metrics.jsonl, which may be long."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        lines = file.read().decode(errors="replace").splitlines(keepends=True)
    rows = (parse_row(line) for line in reversed(lines) if line.endswith("\n") and '"loss"' in line)
    return next((row for row in rows if row is not None), {})
