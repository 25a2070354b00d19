"""A run's attempts on fixed machines, one after another until it is done or gets nowhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

EXIT_PREEMPTED = 85


def keep_running(run_dir: Path, attempt: Callable[[], int], *, max_restarts: int) -> int:
    """Call `attempt` (it starts the ranks and waits for them) until the run is done; its exit status.

    A run that ended because it was asked to (marker PREEMPTED) is not started again: status 85. A run whose
    process died is, from its newest checkpoint, at most `max_restarts` times and while it makes progress; then the
    status is the attempt's.
    """
    (run_dir / "PREEMPTED").unlink(missing_ok=True)
    before = None
    for left in range(max_restarts, -1, -1):
        status = attempt()
        if status == 0:
            return 0
        if (run_dir / "PREEMPTED").exists():
            say(f"{run_dir} was asked to stop and saved; the same command goes on")
            return EXIT_PREEMPTED
        newest = _newest_checkpoint(run_dir)
        if newest == before:
            say(f"a process ended with status {status}, again without a new checkpoint; not started again")
            return status
        before = newest
        say(f"a process ended with status {status}; {left} restarts left")
    return status


def say(message: str) -> None:
    print(f"fovea launch: {message}", file=sys.stderr, flush=True)


def _newest_checkpoint(run_dir: Path) -> str:
    latest = run_dir / "checkpoints" / "latest"
    return latest.read_text(encoding="utf-8") if latest.exists() else "none"
