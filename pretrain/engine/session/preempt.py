"""Requests to stop or save: signals and files set flags, which all ranks receive with the next step."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

from pretrain.core.files import write_text

STOP, SAVE = 1, 2  # bits of a request
ABANDON = 4  # the step: this rank has no data for it and stopped waiting
EXIT_PREEMPTED = 85
_POLL_SECONDS = 1.0
_PATIENCE_SECONDS = 5.0
_GIVES_UP = "gives up waiting"
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Watch:
    """Handles SIGTERM, SIGUSR1 and SIGINT on each rank; rank 0 also checks for files `stop` and `save` in the folder.

    Handlers only set a flag; all ranks save at the end of a step. A second SIGINT interrupts at once.
    Outside the main thread, where Python allows no handlers, only the files are checked.
    """

    def __init__(self, run_dir: Path, *, rank: int):
        self._run_dir, self._rank = run_dir, rank
        self._signal: int | None = None
        self._next_look, self._next_question, self._waits_since = 0.0, 0.0, 0.0
        self._gives_up = False
        self._folder = run_dir.stat() if rank == 0 else None
        in_main_thread = threading.current_thread() is threading.main_thread()
        self._before = {number: signal.getsignal(number) for number in _SIGNALS if in_main_thread}
        for number in self._before:
            signal.signal(number, self._on_signal)

    def poll(self) -> int:
        """The requests of this rank: bits of STOP and SAVE. Checks the files at most once a second.

        Raises:
            FileNotFoundError: the run folder was removed or replaced; what is written to it would be lost.
        """
        wanted = STOP if self._signal is not None else 0
        if self._rank == 0 and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _POLL_SECONDS
            if not _is_same(self._run_dir, self._folder):
                problem = "the run folder was removed or replaced while the run wrote to it"
                raise FileNotFoundError(errno.ENOENT, problem, str(self._run_dir))
            # One file is one request: it is removed, so that it does not also stop the next run.
            for name, bit in (("stop", STOP), ("save", SAVE)):
                path = self._run_dir / name
                if path.exists():
                    path.unlink(missing_ok=True)
                    wanted |= bit
        return wanted

    def gives_up_waiting(self) -> bool:
        """Whether a rank that waits for data should stop waiting: a stop was requested some seconds ago, or another
        rank gave up.

        Usually the data comes, and the step ends as any other; storage that does not answer would hold the run.
        """
        from pretrain.core import distributed  # imports torch, which those that read markers do without

        now = time.monotonic()
        if self._gives_up or now < self._next_question:
            return self._gives_up
        self._next_question = now + _POLL_SECONDS
        by_file = (self._run_dir / "stop").exists()  # rank 0 may wait in a collective
        if self._signal is not None or by_file:
            self._waits_since = self._waits_since or now
            self._gives_up = now - self._waits_since >= _PATIENCE_SECONDS
        if self._gives_up:
            distributed.announce(_GIVES_UP)
        else:
            self._gives_up = distributed.is_announced(_GIVES_UP)
        if self._gives_up and by_file:
            (self._run_dir / "stop").unlink(missing_ok=True)
        return self._gives_up

    @property
    def reason(self) -> str:
        """Reason of the stop, for the log of this rank."""
        return signal.Signals(self._signal).name if self._signal is not None else "the file stop, or another rank"

    def close(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._signal = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_same(folder: Path, before: os.stat_result | None) -> bool:
    try:
        return before is None or os.path.samestat(folder.stat(), before)
    except FileNotFoundError:
        return False
    except OSError:  # a network file system that does not answer for a moment
        return True


def mark(run_dir: Path, name: str, text: str = "") -> None:
    """Write the marker file `name` (PREEMPTED or DONE) for the job script: launchers do not pass on exit codes."""
    if name not in ("PREEMPTED", "DONE"):
        raise ValueError(f"marker {name!r}: expected PREEMPTED or DONE")
    write_text(run_dir / name, text + "\n")


def mark_again(run_dir: Path, *, rank: int) -> None:
    """Rank 0 writes DONE again, for a launcher: the run was complete before, and this launch has seen it."""
    if rank == 0:
        write_text(run_dir / "DONE", (run_dir / "DONE").read_text(encoding="utf-8"))


def written(run_dir: Path, name: str) -> list[int]:
    """Tells one writing of a marker from another; empty without a marker. Launchers compare it before and after."""
    try:
        with (run_dir / name).open("rb") as file:  # a network file system asks its server when a file is opened
            found = os.fstat(file.fileno())
    except FileNotFoundError:
        return []
    return [found.st_ino, found.st_mtime_ns]


def unmark(run_dir: Path) -> None:
    """Remove the markers of an earlier start."""
    for name in ("PREEMPTED", "DONE"):
        (run_dir / name).unlink(missing_ok=True)
