"""The machine that a configuration is for: this one, or a GPU by its name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launch.plan.hardware import find_gpu
from launch.plan.machine import Machine
from pretrain.core.machine.resources import GIB

_CPU_INFO = Path("/proc/cpuinfo")
_FAST_BF16 = ("avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Target:
    """memory: bytes of the GPU, or free ones of this machine. gpu: whether there is one. name: in reasons."""

    name: str
    gpu: bool
    memory: float
    cores: int
    bf16: bool

    @property
    def workers(self) -> int:
        """Reading processes of a rank."""
        return max(1, min(8, self.cores - 1))


def target(gpu: str | None) -> Target:
    """This machine, or one with the GPU of that name and the cores of this one. ValueError: an unknown GPU."""
    here = Machine.here(Path())
    if gpu is not None:
        return Target(gpu.lower(), True, find_gpu(gpu).memory * GIB, here.cpus, True)
    if here.gpu_memory:
        return Target("the GPU of this machine", True, here.gpu_memory, here.cpus, True)
    return Target(f"{here.cpus} CPU cores", False, here.memory, here.cpus, _cpu_has_bf16())


def _cpu_has_bf16() -> bool:
    try:
        flags = _CPU_INFO.read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return any(flag in flags for flag in _FAST_BF16)
