"""A node: the resources of this machine and its GPUs. Measured without torch."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from pretrain.core.machine.resources import Resources


@dataclass(frozen=True)
class Machine(Resources):
    """One node, as seen by a process on it. gpu_memory: bytes of the first GPU, None without a GPU driver."""

    gpu_memory: int | None
    gpus: int = 0

    @staticmethod
    def here(run_dir: Path) -> Machine:
        """Measure; `disk` is the free space for `run_dir`."""
        return Machine(**vars(Resources.here(run_dir)), gpu_memory=_gpu_memory(), gpus=count_gpus())


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
