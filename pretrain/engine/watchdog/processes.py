"""Other processes of this node: read their state, dump their Python stacks, end them. Linux only; no torch."""

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
Process = tuple[int, int]  # pid and start time, since pids are reused


def started(pid: int) -> int:
    """Start time of a process, in clock ticks since boot; 0 if there is no such process."""
    return int(fields[19]) if (fields := _stat(pid)) else 0


def state(pid: int, start: int) -> str:
    """State letter: R running, S sleeping, D waiting in the kernel, T stopped, Z zombie; X: no such process."""
    fields = _stat(pid)
    return fields[0] if fields and int(fields[19]) == start else "X"


def _stat(pid: int) -> list[str]:
    try:
        # The name in brackets may contain any character.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def memory_of(pid: int, fd: int) -> mmap.mmap | None:
    """The heartbeat memory of a process; None if it is closed or the process has ended.

    Raises:
        OSError: no permission to read it.
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
    """By pid: the Python stacks of all threads of the process, then those of its data workers.

    A stopped process is continued (SIGCONT) so that it can write them.
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
    texts: dict[int, str] = {}
    for pid, _ in processes:
        parts = [found.get(pid) or "no stacks: the process has ended, or waits in the kernel\n"]
        for worker in families.get(pid, ())[1:]:
            if worker in found:
                parts.append(f"\nits data worker, process {worker}:\n{found[worker] or 'no stacks'}\n")
        texts[pid] = "".join(parts)
    return texts


def _stacks_of(pid: int) -> Path | None:
    """The memfd to which the process writes its stacks; None for a process without one (a fork server, a compiler)."""
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
    for parent in family:  # grows during the iteration
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            with suppress(OSError):
                found = [int(child) for child in children.read_text().split()]
                family += found
    return family[1:]


def end(processes: Sequence[Process], *, with_signal: int) -> None:
    """Send `with_signal`, then SIGKILL to processes that are still alive after _END_SECONDS."""
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
    """Make signal `number` end this process at once with exit status `number`: the handler is C's `_exit`.

    A Python handler would need the GIL, which a hanging rank may never release.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    libc.signal(number, ctypes.cast(libc._exit, ctypes.c_void_p))
