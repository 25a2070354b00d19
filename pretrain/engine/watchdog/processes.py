"""Other processes of this node: what they are doing, their Python stacks, their end. Linux; no torch."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pretrain.core.heartbeat import HEART, STACKS, STACKS_SIGNAL

_STACKS_SECONDS = 5.0
_END_SECONDS = 5.0
Process = tuple[int, int]  # its number, and when it started: numbers are used again


def started(pid: int) -> int:
    """Clock ticks after the machine's start; 0 when there is no such process."""
    return int(fields[19]) if (fields := _stat(pid)) else 0


def state(pid: int, start: int) -> str:
    """One letter: R runs, S sleeps, D waits in the kernel, T is stopped, Z has ended; X: it no longer exists."""
    fields = _stat(pid)
    return fields[0] if fields and int(fields[19]) == start else "X"


def _stat(pid: int) -> list[str]:
    try:
        # The name in brackets may hold anything.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def memory_of(pid: int, fd: int) -> mmap.mmap | None:
    """The heartbeat of a process; None when it has closed it, or no longer exists.

    Raises:
        OSError: it may not be read.
    """
    path = Path(f"/proc/{pid}/fd/{fd}")
    try:
        if not str(path.readlink()).startswith(f"/memfd:{HEART}"):
            return None
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), mmap.PAGESIZE, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        return None


def dump_stacks(processes: Sequence[Process]) -> dict[int, str]:
    """By number of the process: Python stacks of all its threads, then those of its data workers.

    A stopped process is continued (SIGCONT) to write them.
    """
    families = {pid: [pid, *_descendants(pid)] for pid, start in processes if state(pid, start) not in "XZ"}
    asked: dict[int, Path] = {}
    for pid in (member for family in families.values() for member in family):
        if (written := _stacks_of(pid)) is not None:
            asked[pid] = written
            with suppress(OSError):
                os.kill(pid, STACKS_SIGNAL)
                os.kill(pid, signal.SIGCONT)
    end = time.monotonic() + _STACKS_SECONDS
    found, before = {pid: _read(path) for pid, path in asked.items()}, {}
    while (not all(found.values()) or found != before) and time.monotonic() < end:
        time.sleep(0.1)
        before, found = found, {pid: _read(path) for pid, path in asked.items()}
    texts = {}
    for pid, _ in processes:
        parts = [found.get(pid) or "no answer: the process has ended, or waits in the kernel\n"]
        for worker in families.get(pid, ())[1:]:
            if worker in found:
                parts.append(f"\nits data worker, process {worker}:\n{found[worker] or 'no answer'}\n")
        texts[pid] = "".join(parts)
    return texts


def _stacks_of(pid: int) -> Path | None:
    """The memory that the process writes its stacks to; None for one that does not (a fork server, a compiler)."""
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                if str(entry.readlink()).startswith(f"/memfd:{STACKS}"):
                    return entry
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _descendants(pid: int) -> list[int]:
    found, family = [], [pid]
    for parent in family:  # grows while it is walked
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            with suppress(OSError):
                found = [int(child) for child in children.read_text().split()]
                family += found
    return family[1:]


def end(processes: Sequence[Process], *, with_signal: int) -> None:
    """Send `with_signal`, then SIGKILL to those that still run after a few seconds."""
    left = _send(processes, with_signal)
    patience = time.monotonic() + _END_SECONDS
    while left and time.monotonic() < patience:
        time.sleep(0.05)
        left = [process for process in left if state(*process) not in "XZ"]
    _send(left, signal.SIGKILL)


def _send(processes: Sequence[Process], number: int) -> list[Process]:
    there = [process for process in processes if state(*process) not in "XZ"]
    for pid, _ in there:
        with suppress(OSError):
            os.kill(pid, number)
            os.kill(pid, signal.SIGCONT)
    return there


def end_by_signal(number: int) -> None:
    """Signal `number` ends this process at once with that status, whatever holds it: C's `_exit` is the handler.

    A Python handler would need the GIL, which a rank that hangs may never release.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    libc.signal(number, ctypes.cast(libc._exit, ctypes.c_void_p))
