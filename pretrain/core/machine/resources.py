"""The resources of this machine: cores, memory, shared memory, open files, disk. Measured without torch."""

from __future__ import annotations

import os
import resource
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
SHARED_MEMORY = Path("/dev/shm")  # where data workers put their batches
_MEMORY, _CONTROL_GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Resources:
    """What is free on this machine, as seen by a process on it. memory, shm, disk: bytes. open_files: its limit."""

    cpus: int
    memory: int
    shm: int
    open_files: int
    disk: int

    @staticmethod
    def here(run_dir: Path) -> Resources:
        """Measure; `disk` is the free space for `run_dir`."""
        home = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if folder.exists())
        return Resources(
            cpus=len(os.sched_getaffinity(0)),
            memory=_free_memory(),
            shm=shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.exists() else 0,
            open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            disk=shutil.disk_usage(home).free,
        )


def open_now() -> int:
    """Number of files that this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def _free_memory() -> int:
    """Bytes that processes here can still take: of the machine, or of the container's control group (version 2)."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError, StopIteration):
        lines = _MEMORY.read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    with suppress(OSError, ValueError):  # "max": no limit
        limit = int((_CONTROL_GROUP / "memory.max").read_text(encoding="ascii"))
        free = min(free, limit - int((_CONTROL_GROUP / "memory.current").read_text(encoding="ascii")))
    return max(0, free)


def size_text(number: float) -> str:
    """A number of bytes, for messages."""
    return f"{number / GIB:.1f} GiB" if number >= GIB else f"{number / 2**20:.1f} MiB"
