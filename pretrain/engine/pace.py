"""How fast a run goes, between one line of its log and the next."""

from __future__ import annotations

import time


class Pace:
    """Rates since it was last asked.

    Args:
        global_batch: images per step. start_step: where the run (re)starts.
    """

    def __init__(self, *, global_batch: int, start_step: int):
        self._global_batch = global_batch
        self._since = (start_step, time.perf_counter(), 0.0)

    def rates(self, step: int, waited: float) -> dict[str, float]:
        """Images per second, and the share of the time that was spent waiting for data.

        Args:
            waited: seconds spent waiting since the start.
        """
        (last_step, last_time, last_waited), now = self._since, time.perf_counter()
        self._since = (step, now, waited)
        return {
            "images_per_second": (step - last_step) * self._global_batch / (now - last_time),
            "data_wait": (waited - last_waited) / (now - last_time),
        }
