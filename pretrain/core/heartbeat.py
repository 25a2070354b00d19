"""Reports the progress of this process to the watchdog of its node through shared memory. No torch here.

A beat writes a few numbers into a memfd that the watchdog maps, which can read them even if this process never runs
Python again. Stacks are passed in the same way, from a signal handler that needs no GIL. Without a watchdog (tests,
data workers, tools), every function here does nothing.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import socket
import struct
import time
from dataclasses import dataclass

# In the order of a step: of two ranks at the same step, the one in the earlier phase is behind.
PHASES = ("start", "data", "forward", "backward", "agree", "update", "after", "save", "probe", "end", "gone")
KINDS = ("start", "step", "save", "probe")  # phases with separate limits
COLLECTIVES = ("", "all_reduce", "all_gather", "all_gather_object", "broadcast", "broadcast_object", "barrier")
STACKS_SIGNAL = signal.SIGUSR2
HEART, STACKS = "fovea-heartbeat", "fovea-stacks"
_KIND_OF = {"start": 0, "save": 2, "probe": 3, "end": 0, "gone": 0}  # all others: step
_RECENT_STEPS = 64
_LAYOUT = struct.Struct("=8q4dq")
_heart: Heart | None = None
_shows_stacks = False


@dataclass(frozen=True)
class Reading:
    """What one process last reported.

    Attributes:
        beats: number of reports. kind: the limit that applies, of KINDS.
        step: the current step, from 1. micro: its micro-batch. collectives: number that `pretrain.core.distributed` has
            started. inside: the collective that has not returned yet, or "".
        slowest: longest time between two beats in the last 64 to 128 steps, in seconds, by kind.
    """

    beats: int
    phase: str
    kind: str
    step: int
    micro: int
    collectives: int
    inside: str
    slowest: tuple[float, ...]


class Heart:
    """Writes the heartbeat of a process. fd: of the shared memory."""

    def __init__(self) -> None:
        self.fd = os.memfd_create(HEART)
        os.ftruncate(self.fd, mmap.PAGESIZE)
        self._memory = mmap.mmap(self.fd, mmap.PAGESIZE)
        self.phase, self.step, self.micro, self.collectives, self.inside = 0, 0, 0, 0, 0
        self._beats, self._kind, self._first_step = 0, 0, -1
        self._newer, self._older = [0.0] * len(KINDS), [0.0] * len(KINDS)
        self._since, self._turned = time.monotonic(), 0
        self.beat()

    def mark(self, phase: str, step: int, micro: int) -> None:
        self._measure()
        kind = _KIND_OF.get(phase, 1)
        if kind == 1 and self._first_step < 0:
            self._first_step = step
        elif phase in ("start", "end"):
            self._first_step = -1
        # The first step compiles, opens files and fills caches, so it has the limit of the start.
        self._kind = 0 if kind == 1 and step == self._first_step else kind
        self.phase, self.step, self.micro = PHASES.index(phase), step, micro
        if abs(step - self._turned) >= _RECENT_STEPS:
            self._older, self._newer, self._turned = self._newer, [0.0] * len(KINDS), step
        self.beat()

    def beat(self) -> None:
        self._measure()
        self._beats += 1
        slowest = map(max, self._older, self._newer)
        now = (self.phase, self._kind, self.step, self.micro, self.collectives, self.inside, 0)
        _LAYOUT.pack_into(self._memory, 0, self._beats, *now, *slowest, self._beats)

    def _measure(self) -> None:
        now = time.monotonic()
        self._newer[self._kind] = max(self._newer[self._kind], now - self._since)
        self._since = now

    def close(self) -> None:
        self._memory.close()
        os.close(self.fd)


def host_name() -> str:
    """Name of this node in SLURM, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def begin() -> Heart:
    """Start the heartbeat of this process, readable by whoever maps `Heart.fd`."""
    global _heart
    end()
    _heart = Heart()
    return _heart


def end() -> None:
    global _heart
    if _heart is not None:
        _heart.mark("gone", _heart.step, 0)
        _heart.close()
        _heart = None


def mark(phase: str, step: int | None = None, micro: int = 0) -> None:
    """This process enters a phase of PHASES, the same on every rank. step: the current step, from 1."""
    if _heart is not None:
        _heart.mark(phase, _heart.step if step is None else step, micro)


def alive() -> None:
    """Report progress within a phase, for instance one batch of an evaluation."""
    if _heart is not None:
        _heart.beat()


def enter(collective: str) -> None:
    """This process starts one of COLLECTIVES."""
    if _heart is not None:
        _heart.collectives += 1
        _heart.inside = COLLECTIVES.index(collective)
        _heart.beat()


def leave() -> None:
    """The collective has returned."""
    if _heart is not None:
        _heart.inside = 0
        _heart.beat()


def read(memory: mmap.mmap) -> Reading | None:
    """The last report in `memory`; None while one is being written."""
    phase: int
    kind: int
    inside: int
    beats, phase, kind, step, micro, collectives, inside, _, *slowest, again = _LAYOUT.unpack_from(memory, 0)
    if beats != again:
        return None
    return Reading(beats, PHASES[phase], KINDS[kind], step, micro, collectives, COLLECTIVES[inside], tuple(slowest))


def show_stacks_on_signal() -> None:
    """Make STACKS_SIGNAL write the Python stacks of all threads, also blocked ones, to the memfd STACKS."""
    global _shows_stacks
    if _shows_stacks or not hasattr(os, "memfd_create"):
        return
    _shows_stacks = True
    faulthandler.register(STACKS_SIGNAL, file=os.memfd_create(STACKS), all_threads=True, chain=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {STACKS_SIGNAL})
