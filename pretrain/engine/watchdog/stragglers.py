"""Detects ranks that stay slower than the others. Their times are reduced with the losses of each step."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from pretrain.engine.protocol import StepResult

_WINDOW_STEPS = 50
_WINDOWS = 3  # consecutive slow windows before a report
_SLOWER = 1.25  # times the median rank
_SHARE = 0.05  # minimum delay, as a fraction of the step time


class Stragglers:
    """Call it after each step.

    Args:
        hosts: host name of each rank.
    """

    def __init__(self, hosts: Sequence[str], *, window: int = _WINDOW_STEPS):
        self._hosts, self._window = hosts, window
        self._rows: list[tuple[float, tuple[float, ...], tuple[float, ...]]] = []
        self._streaks: dict[tuple[str, int], int] = {}

    def __call__(self, result: StepResult) -> list[str]:
        """Reports on ranks that have been slower for _WINDOWS windows; each is reported once while it lasts."""
        self._rows.append((result.seconds, result.works, result.waits))
        if len(self._rows) < self._window or len(self._hosts) < 2:
            return []
        rows, self._rows = self._rows, []
        whole = statistics.fmean(seconds for seconds, _, _ in rows)
        works = self._judge("forward passes take", [works for _, works, _ in rows], whole)
        return works + self._judge("waits for data take", [waits for _, _, waits in rows], whole)

    def _judge(self, what: str, rows: Sequence[Sequence[float]], step_seconds: float) -> list[str]:
        # Medians over the steps, so that a single long wait does not count.
        times = [statistics.median(column) for column in zip(*rows, strict=True)]
        middle = statistics.median_low(times)
        found: list[tuple[int, float]] = []
        for rank, seconds in enumerate(times):
            key = (what, rank)
            slow = seconds > _SLOWER * middle and seconds - middle > _SHARE * step_seconds
            self._streaks[key] = self._streaks.get(key, 0) + 1 if slow else 0
            if self._streaks[key] == _WINDOWS:
                found.append((rank, seconds))
        if not found:
            return []
        ranks = [rank for rank, _ in found]
        hosts = sorted({self._hosts[rank] for rank in ranks})
        # Are all ranks of these hosts slow?
        whole = [host for host in hosts if all(r in ranks for r, h in enumerate(self._hosts) if h == host)]
        who = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} ({', '.join(hosts)})"
        if whole == hosts and len(ranks) > len(hosts):
            who = f"all ranks of {', '.join(hosts)}"
        slowest = max(seconds for _, seconds in found)
        return [
            f"{who} {'is' if len(ranks) == 1 else 'are'} slower than the others: {what} {slowest:.3f} s per step, "
            f"the median rank {middle:.3f} s, for {_WINDOWS * self._window} steps; this delays every step"
        ]
