"""Requests to stop or save: signals and files set flags, which reach all ranks with the next step."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType

from pretrain.core.files import write_text

STOP, SAVE = 1, 2  # bits of a request
EXIT_PREEMPTED = 85
_POLL_SECONDS = 1.0
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Watch:
    """Listens for SIGTERM, SIGUSR1 and SIGINT on each rank, and on rank 0 for files `stop` and `save` in the folder.

    Handlers only set a flag: the save happens at the next step's edge, on all ranks. A second SIGINT interrupts.
    Outside the main thread, where Python allows no handlers, it watches the files only.
    """

    def __init__(self, run_dir: Path, *, rank: int):
        self._run_dir, self._rank = run_dir, rank
        self._signal: int | None = None
        self._next_look = 0.0
        in_main_thread = threading.current_thread() is threading.main_thread()
        self._before = {number: signal.getsignal(number) for number in _SIGNALS if in_main_thread}
        for number in self._before:
            signal.signal(number, self._on_signal)

    def poll(self) -> int:
        """The requests of this rank: bits of STOP and SAVE. Checks the files at most once a second."""
        wanted = STOP if self._signal is not None else 0
        if self._rank == 0 and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _POLL_SECONDS
            # A file is one request: taken away, it does not stop the next run too.
            for name, bit in (("stop", STOP), ("save", SAVE)):
                path = self._run_dir / name
                if path.exists():
                    path.unlink(missing_ok=True)
                    wanted |= bit
        return wanted

    @property
    def reason(self) -> str:
        """For the log of this rank."""
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


def mark(run_dir: Path, name: str, text: str = "") -> None:
    """Leave the marker `name` (PREEMPTED or DONE) for the script that started us: exit codes get lost in launchers."""
    if name not in ("PREEMPTED", "DONE"):
        raise ValueError(f"marker {name!r}: expected PREEMPTED or DONE")
    write_text(run_dir / name, text + "\n")


def unmark(run_dir: Path) -> None:
    """Remove the markers of an earlier start."""
    for name in ("PREEMPTED", "DONE"):
        (run_dir / name).unlink(missing_ok=True)
