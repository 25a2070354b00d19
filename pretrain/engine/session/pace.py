"""The speed of a run between two log lines."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager

import torch


class Pace:
    """Rates since the previous call of `rates`.

    Args:
        global_batch: images per step. start_step: where the run (re)starts.
    """

    def __init__(self, *, global_batch: int, start_step: int):
        self._global_batch = global_batch
        self._since = (start_step, time.perf_counter(), 0.0)

    def rates(self, step: int, waited: float) -> dict[str, float]:
        """Images per second, and the fraction of time spent waiting for data.

        Args:
            waited: seconds spent waiting since the start.
        """
        (last_step, last_time, last_waited), now = self._since, time.perf_counter()
        self._since = (step, now, waited)
        return {
            "images_per_second": (step - last_step) * self._global_batch / (now - last_time),
            "data_wait": (waited - last_waited) / (now - last_time),
        }


class ForwardClock:
    """Seconds of the forward passes of a step. They show the speed of this rank alone; backward waits for the others.

    On a GPU measured by CUDA events, which are read one step later to avoid a synchronization.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def of(self, micro: int) -> Generator[None, None, None]:
        """Context for the forward pass of a micro-batch; `micro` counts from 0 in each step."""
        if not self._on_gpu:
            begun = time.perf_counter()
            yield
            self._seconds = time.perf_counter() - begun + (self._seconds if micro else 0.0)
            return
        if micro == 0:
            self._seconds = sum(a.elapsed_time(b) for a, b in self._events if b.query()) / 1000
            self._events = []
        self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        self._events[-1][0].record()
        yield
        self._events[-1][1].record()

    @property
    def seconds(self) -> float:
        """Of the current step; on a GPU, of the previous step."""
        return self._seconds
