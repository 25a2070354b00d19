"""The resources of this machine: cores, memory, shared memory, open files, disk. Measured without torch."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
SHM = Path("/dev/shm")  # where data workers put their batches


@dataclass(frozen=True)
class Machine:
    """One node, as seen by a process on it. Memory and disk in bytes; gpu_memory is None without a GPU driver."""

    cpus: int
    memory: int
    shm: int
    open_files: int
    disk: int
    gpu_memory: int | None
    gpus: int = 0

    @staticmethod
    def here(run_dir: Path) -> Machine:
        """Measure; `disk` is the free space for `run_dir`."""
        home = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if folder.exists())
        return Machine(
            cpus=len(os.sched_getaffinity(0)),
            memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            shm=shutil.disk_usage(SHM).free if SHM.exists() else 0,
            open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            disk=shutil.disk_usage(home).free,
            gpu_memory=_gpu_memory(),
            gpus=count_gpus(),
        )


def count_gpus() -> int:
    """Number of GPUs that the driver lists; 0 without a driver."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())


def _gpu_memory() -> int | None:
    """Of the first GPU, by its driver."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        return int(done.stdout.split()[0]) * 2**20 if done.returncode == 0 else None
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        return None
