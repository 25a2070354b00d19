"""A run's attempts on fixed machines, one after another until it is done, makes no progress or is requested to stop."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.engine.session.preempt import written

EXIT_PREEMPTED = 85
EXIT_UNFINISHED = 1


class StopRequest:
    """A person's request to stop the run. asked: it was made. end: ends the processes at once; set by each attempt."""

    def __init__(self, run_dir: Path):
        self.run_dir, self.asked = run_dir, False
        self.end: Callable[[], object] = lambda: None

    def on_signal(self, number: int, frame: object) -> None:
        """The first signal requests the run to save and stop, without a deadline; a second one ends it."""
        del number, frame
        if self.asked:
            self.end()
            return
        self.asked = True
        say("stop requested: the run saves at the end of its step; a second signal ends it at once")
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            (self.run_dir / "stop").touch()
        except OSError as error:
            say(f"the request failed ({error}); ending the run")
            self.end()


def keep_running(run_dir: Path, attempt: Callable[[StopRequest], int], *, max_restarts: int) -> int:
    """Call `attempt` (it starts the ranks and waits for them) until the run is done; its exit status.

    Status 0 requires the run's own marker DONE, written during this call: a run that was complete before writes it
    again. A run that ended on request (marker PREEMPTED, or a signal here) is
    not restarted: status 85 if it has saved. A run whose process died is restarted from its newest checkpoint, at most
    `max_restarts` times and while it makes progress; then the status is the attempt's.
    """
    for left_before in ("PREEMPTED", "stop"):
        (run_dir / left_before).unlink(missing_ok=True)
    before, status, done = None, 0, written(run_dir, "DONE")
    with _listening(StopRequest(run_dir)) as request:
        for left in range(max_restarts, -1, -1):
            status = attempt(request)
            if status == 0 and written(run_dir, "DONE") not in ([], done):
                return 0
            if (run_dir / "PREEMPTED").exists():
                say(f"{run_dir} was stopped on request and saved; the same command resumes it")
                return EXIT_PREEMPTED
            if status == 0:
                say(f"its processes ended with status 0, but wrote no marker DONE to {run_dir}: the run did not finish")
                return EXIT_UNFINISHED
            if request.asked:
                say(f"{run_dir} ended before it saved; the same command resumes from its newest checkpoint")
                return status
            newest = _newest_checkpoint(run_dir)
            if newest == before:
                say(f"a process ended with status {status}, again without a new checkpoint; not restarted")
                return status
            before = newest
            say(f"a process ended with status {status}; {left} restarts left")
    return status


@contextmanager
def _listening(request: StopRequest) -> Iterator[StopRequest]:
    """Signals go to `request`, except those that the parent ignores (nohup)."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = {number: handler for number in numbers if (handler := signal.getsignal(number)) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, request.on_signal)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(message: str) -> None:
    print(f"fovea launch: {message}", file=sys.stderr, flush=True)


def _newest_checkpoint(run_dir: Path) -> str:
    latest = run_dir / "checkpoints" / "latest"
    return latest.read_text(encoding="utf-8") if latest.exists() else "none"
