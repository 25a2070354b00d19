"""The attempts of one SLURM job: how each ended, and whether another one follows.

Requeueing needs a history, or a broken job would requeue forever. It is `RUN/slurm/attempts.jsonl`: a line when an
attempt begins, a line when it ends. An attempt without an end was killed with its batch script: a node was lost.
Progress is the step of the newest checkpoint. No torch here, and nothing of SLURM except the messages in srun's log.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from launch.hosts.restarts import EXIT_PREEMPTED, say
from pretrain.engine.checkpoint.commit import MANIFEST, checkpoints
from pretrain.engine.session.preempt import written

Outcome = Literal["done", "preempted", "time limit", "stopped", "ended", "failed", "lost"]
Action = Literal["go", "done", "requeue", "stop"]
# Attempts in a row that may end at one step. A lost node is rarely caused by the run.
PATIENCE = {"failed": 2, "time limit": 2, "lost": 3}
ATTEMPT_KEYS = ("job", "event", "restart", "step", "time")
MAX_FAILURES = 20  # of one job, with or without progress


@dataclass(frozen=True)
class Attempt:
    """How one attempt ended. step: of the newest checkpoint at that time. node: the only one that failed, or None."""

    job: str
    restart: int
    outcome: Outcome
    step: int
    node: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class RestartDecision:
    """What the batch script does next, and the reason for the job's log."""

    action: Action
    why: str
    exclude: tuple[str, ...] = ()


def decide(attempts: Sequence[Attempt], *, spare: int) -> RestartDecision:
    """What follows the last of a job's ended `attempts`.

    Args:
        spare: nodes of the partition beyond those the job needs.
    """
    last = attempts[-1]
    if last.outcome == "done":
        return RestartDecision("done", f"done at step {last.step}")
    if last.outcome == "ended":
        return RestartDecision("stop", f"SLURM ended the job at step {last.step} and may start it again")
    if last.outcome == "stopped":
        return RestartDecision("stop", f"stopped on request at step {last.step}; resume: `fovea launch slurm resume`")
    exclude, failing = _failing_nodes(attempts, spare=spare)
    if last.outcome == "preempted":
        return RestartDecision("requeue", f"preempted at step {last.step}", exclude)
    streak = _without_progress(attempts)
    # A rank that ends by an exception does so on any node; one killed twice on one node is tried on another.
    elsewhere = last.node in exclude and "Exited" not in last.detail
    if len(streak) >= PATIENCE[last.outcome] and not elsewhere:
        ways = "; ".join(sorted({attempt.detail or attempt.outcome for attempt in streak}))
        return RestartDecision(
            "stop", f"{len(streak)} attempts ended at step {last.step} ({ways}); not restarted{failing}"
        )
    failures = sum(attempt.outcome in ("failed", "lost") for attempt in attempts)
    if failures >= MAX_FAILURES:
        return RestartDecision("stop", f"{failures} attempts of this job failed; not restarted{failing}")
    return RestartDecision(
        "requeue", f"{last.outcome} at step {last.step} ({last.detail or 'reason unknown'})", exclude
    )


def _without_progress(attempts: Sequence[Attempt]) -> list[Attempt]:
    """The last attempts that ended at the same step; preemption is not a failure."""
    streak: list[Attempt] = []
    for attempt in reversed(attempts):
        if attempt.step != attempts[-1].step:
            break
        if attempt.outcome in PATIENCE:
            streak.append(attempt)
    return streak


def _failing_nodes(attempts: Sequence[Attempt], *, spare: int) -> tuple[tuple[str, ...], str]:
    """Nodes that failed alone twice, at most `spare` of them, and a remark about the others."""
    counts = Counter(attempt.node for attempt in attempts if attempt.node and attempt.outcome in ("failed", "lost"))
    failing = [node for node, count in counts.most_common() if count >= 2]
    kept = failing[spare:]
    remark = f"; {', '.join(kept)} failed twice, but the partition has no other node" if kept else ""
    return tuple(failing[:spare]), remark


class AttemptLog:
    """`attempts.jsonl` of a run: the lines of one job's attempts, and the lines to add."""

    def __init__(self, run_dir: Path, *, job: str, restart: int):
        self.run_dir, self.job, self.restart = run_dir, job, restart
        self.path = run_dir / "slurm" / "attempts.jsonl"

    def begin(self, *, nodes: Sequence[str], down: Iterable[str]) -> list[Attempt]:
        """Record that this attempt begins; return the ended attempts of this job, with a lost one marked as ended.

        Args:
            nodes: of this attempt. down: nodes that SLURM reports as down; those of a lost attempt are its reason.
        """
        rows = self._rows()
        ended = [self._attempt(row) for row in rows if row["event"] == "end"]
        begun = [row for row in rows if row["event"] == "begin"]
        if begun and not any(attempt.restart == begun[-1]["restart"] for attempt in ended):
            node, detail = describe_lost(set(begun[-1]["nodes"]) & set(down))
            step = newest_step(self.run_dir)
            ended.append(
                Attempt(self.job, begun[-1]["restart"], "lost", step, node, f"{detail}, with the batch script")
            )
            self._add("end", **_without_identity(ended[-1]), restart=begun[-1]["restart"])
        done = written(self.run_dir, "DONE")
        self._add("begin", nodes=list(nodes), step=newest_step(self.run_dir), done=done, restart=self.restart)
        return ended

    def done_before(self) -> list[int]:
        """What `written` gave for the marker DONE when this attempt began."""
        begun = [row for row in self._rows() if (row["event"], row["restart"]) == ("begin", self.restart)]
        return begun[-1].get("done", []) if begun else []

    def end(self, outcome: Outcome, *, node: str | None, detail: str) -> list[Attempt]:
        """Record how this attempt ended; return all ended attempts of this job."""
        attempt = Attempt(self.job, self.restart, outcome, newest_step(self.run_dir), node, detail)
        self._add("end", **_without_identity(attempt), restart=self.restart)
        return [self._attempt(row) for row in self._rows() if row["event"] == "end"]

    def _rows(self) -> list[dict[str, Any]]:
        return [row for row in read_json_lines(self.path, ATTEMPT_KEYS) if row["job"] == self.job]

    def _add(self, event: str, *, restart: int, **facts: Any) -> None:
        at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        add_row(self.path, {"event": event, "job": self.job, "restart": restart, "time": at, **facts})

    def _attempt(self, row: dict[str, Any]) -> Attempt:
        return Attempt(
            *(
                self.job,
                row["restart"],
                row.get("outcome", "failed"),
                row["step"],
                row.get("node"),
                row.get("detail", ""),
            )
        )


def _without_identity(attempt: Attempt) -> dict[str, Any]:
    return {key: value for key, value in asdict(attempt).items() if key not in ("job", "restart")}


def read_json_lines(path: Path, keys: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, each with at least `keys`; an incomplete or damaged line is named on stderr."""
    rows: list[dict[str, Any]] = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            row: Any = json.loads(line) if line else {}
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and set(keys) <= row.keys():
            rows.append(row)
        elif line:
            say(f"{path}: line {number} is damaged and is not used: {line[:60]!r}")
    return rows


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Append one line; an incomplete line before it stays separate."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * bool(torn) + json.dumps(row) + "\n")


def cancel_mark(run_dir: Path, job: str) -> Path:
    """The file that marks this job of the run as cancelled."""
    return run_dir / "slurm" / f"{job}.cancelled"


def newest_step(run_dir: Path) -> int:
    """Step of the newest sealed checkpoint; 0 when there is none."""
    for folder in checkpoints(run_dir / "checkpoints"):
        if (folder / MANIFEST).exists():
            return int(folder.name.removeprefix("step-"))
    return 0


def outcome(
    run_dir: Path, *, status: int, asked: str, lost: Iterable[str] = (), done_before: Sequence[int] = ()
) -> Outcome:
    """How the ranks ended, by the markers they left: launchers do not pass on their exit status.

    Args:
        status: of srun. asked: why the batch script requested a stop: "signal" (preemption), "limit" (the time limit
            is near), "overdue" (they did not stop in time and were killed) or "" (no request); followed by
            "term" if SLURM then ended the job, and decides what follows. lost: nodes of the attempt that are down.
        done_before: what `written` gave for the marker DONE before: one that was not written since is not this
            attempt's.
    """
    if status == 0 and written(run_dir, "DONE") not in ([], list(done_before)):
        return "done"
    why = asked.removesuffix("term").strip()
    saved = (run_dir / "PREEMPTED").exists() and why != "overdue"
    if asked.endswith("term") and not (saved and why == "signal"):
        return "lost" if list(lost) else "ended"
    if saved:
        return {"signal": "preempted", "limit": "time limit"}.get(why, "stopped")  # pyright: ignore[reportReturnType]
    return "failed"


def describe_lost(nodes: Iterable[str]) -> tuple[str | None, str]:
    """(the lost node if it is only one, the text to report) of an attempt's nodes that are down."""
    listed = sorted(nodes)
    return (listed[0] if len(listed) == 1 else None), f"down: {', '.join(listed) or 'no node now'}"


_SRUN_ERROR = re.compile(r"srun: error: ([\w.-]+): tasks? ([\d,-]+): (.+)")
_ASKED = ("Terminated", f"Exited with exit code {EXIT_PREEMPTED}")


def blame(srun_log: str) -> tuple[str | None, str]:
    """(the node whose ranks failed first and alone, srun's first message) of srun's messages.

    Messages after srun ended the step are ignored: then the other ranks fail too, without their peers. If
    ranks of several nodes failed before, a kill by a signal takes precedence over an exit status.
    """
    ends = []
    for line in srun_log.splitlines():
        if "Terminating StepId" in line and ends:
            break
        match = _SRUN_ERROR.search(line)
        if match and not match[3].startswith(_ASKED):
            ends.append((match[1], match[3], f"{match[1]} ranks {match[2]}: {match[3]}"))
    if not ends:
        return None, ""
    by_signal = {node for node, how, _ in ends if not how.startswith("Exited")}
    nodes = by_signal or {node for node, _, _ in ends}
    return (nodes.pop() if len(nodes) == 1 else None), ends[0][2]
